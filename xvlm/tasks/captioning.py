"""Captioning: write what is in an image, or in a region of it."""

from typing import Annotated

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor, nn

from xvlm import losses
from xvlm.config import Configured
from xvlm.models.decoder import Captioner, Writing, next_words
from xvlm.models.generation import GenerationConfig, Written, generate
from xvlm.types import Batch, Concepts


class CaptioningConfig(Configured):
    """The defaults are X-VLM's fine-tuning; its pre-training of the decoder has prompt_tokens 1 and no smoothing."""

    # The first tokens of every text, [CLS] included, are given and not learned: "[CLS] a picture of" are 4.
    prompt_tokens: Annotated[int, Field(ge=1)] = 4
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    generation: GenerationConfig = GenerationConfig()


class Task(nn.Module):
    """Next words of captions (X-VLM, reference ``models/model_captioning.py``); texts are ``[CLS] prompt … [SEP]``."""

    def __init__(self, config: CaptioningConfig, model: Captioner):
        super().__init__()
        self.config = config
        self.model = model

    def forward(self, batches: dict[str, Batch]) -> dict[str, Tensor]:
        """Losses by name, ``<stream>/caption``."""
        return {f"{stream}/caption": self.loss(batch) for stream, batch in batches.items()}

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of the words after the prompt, each text about the image or region it belongs to."""
        only, words = next_words(batch.texts, self.config.prompt_tokens)
        logits = self.model.decoder(batch.texts, *self.look(batch), only=only)
        return losses.captions(logits, words, self.config.label_smoothing)

    def look(self, batch: Batch) -> tuple[Concepts, Int[Tensor, "region"]]:
        """The concepts of a batch, and which of them each of its regions is."""
        concepts = self.model.vision(batch.images, batch.regions)
        regions = torch.arange(len(batch.regions.image), device=concepts.pooled.device)
        return concepts, len(batch.images) + regions

    @torch.no_grad()
    def predict(self, batch: Batch, prompt: Int[Tensor, "word"], end: int) -> Written:
        """A caption of each region of a batch (whose texts are not read).

        Args:
            prompt: ids that every caption begins with, [CLS] first.
            end: id of the token that ends a caption.

        Raises:
            ValueError: the prompt leaves no room for a caption.
        """
        concepts, about = self.look(batch)
        rows = about.repeat_interleave(self.config.generation.beams)
        prompts = prompt.repeat(len(about), 1)
        return generate(Writing(self.model.decoder, concepts, rows), prompts, end, self.config.generation)
