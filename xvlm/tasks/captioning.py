"""Captioning: write what is in an image, or in a region of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from xvlm import losses
from xvlm.config import Configured
from xvlm.data.pretrain import Said, Stream, StreamConfig
from xvlm.data.processor import Processor
from xvlm.data.records import Record
from xvlm.metrics import captions as metrics
from xvlm.models.decoder import Captioner, Writing, next_words
from xvlm.models.generation import GenerationConfig, Written, generate
from xvlm.types import Batch, Concepts, Regions

HEADS = ("word_head",)  # of the pre-trained model that a captioner starts from


class CaptioningConfig(Configured):
    """The defaults are X-VLM's fine-tuning; its pre-training of the decoder has no prompt and no smoothing."""

    name: Literal["captioning"] = "captioning"
    prompt: str = "a picture of"  # every caption begins so; what is written is what follows
    prompt_tokens: Annotated[int, Field(ge=1)] = 4  # of the prompt, [CLS] included: these are given and not learned
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    generation: GenerationConfig = GenerationConfig()
    java: bool = False  # METEOR and SPICE as well, which run Java


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


# Training: captions after the prompt.


class Captions(Stream):
    """Records to captions of whole images, each after the prompt. The processor ends texts with [SEP].

    Raises:
        ValueError: the prompt has another number of tokens than the task takes for given.
    """

    def __init__(self, task: CaptioningConfig, config: StreamConfig, processor: Processor, **place: int):
        super().__init__(config, processor, None, **place)
        self.prompt = task.prompt
        given = len(start_of(processor, task.prompt))
        if given != task.prompt_tokens:
            raise ValueError(
                f"task.prompt_tokens is {task.prompt_tokens}, but [CLS] {task.prompt!r} has {given} tokens"
            )

    def _said(self, wanted: Sequence[tuple[str, str, list[float]]], rng: Random) -> list[Said]:
        told = [each for each in wanted if self.processor.has_words(each[1])]
        return super()._said([(kind, f"{self.prompt} {text}", box) for kind, text, box in told], rng)


def start_of(processor: Processor, prompt: str) -> list[int]:
    """Ids that every caption begins with, [CLS] first."""
    if not prompt:
        return [processor.tokenizer.cls_token_id]
    ids = processor.encode(prompt)[0]
    return ids[:-1] if processor.config.end_token else ids


# Evaluation.


@dataclass(frozen=True)
class Captioned:
    """An image with the captions that people wrote and the one that was written."""

    record: str
    references: tuple[str, ...]
    caption: str


@torch.inference_mode()
def ask(
    task: Task, processor: Processor, records: Sequence[Record], images: Float[Tensor, "image 3 height width"]
) -> list[list[Captioned]]:
    """A caption for each image."""
    start, end = start_of(processor, task.config.prompt), processor.tokenizer.sep_token_id
    device = next(task.parameters()).device
    regions = Regions.whole_images(torch.arange(len(images)), processor.config.image_size)
    prompts = processor.pad([start] * len(images))
    written = task.predict(Batch(images, prompts, regions).to(device), torch.tensor(start, device=device), end).texts
    texts = processor.tokenizer.batch_decode(written.ids[:, len(start) :].cpu(), skip_special_tokens=True)
    return [[Captioned(record.id, tuple(record.captions), text)] for record, text in zip(records, texts, strict=True)]


def numbers(rows: Sequence[Captioned], *, java: bool = False) -> dict[str, float]:
    """CIDEr (CIDEr-D), BLEU-1 to BLEU-4 and ROUGE-L of the images that have captions; with ``java``, METEOR and SPICE.

    Raises:
        ValueError: no image has a caption.
        ModuleNotFoundError: for ``java``, pycocoevalcap is not installed.
    """
    known = [row for row in rows if row.references]
    written, references = in_words(known)
    cider = metrics.cider_d(written, references)
    found = {"CIDEr": sum(cider) / len(cider)}
    found |= {f"BLEU-{n}": score for n, score in enumerate(metrics.bleu(written, references), 1)}
    found["ROUGE-L"] = metrics.rouge_l(written, references)
    if java:
        said = {row.record: row.caption for row in known}
        found |= metrics.with_java(said, {row.record: row.references for row in known})
    return found


def in_words(rows: Sequence[Captioned]) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Captions and references as the metrics take them."""
    written = [metrics.words(row.caption) for row in rows]
    return written, [[metrics.words(caption) for caption in row.references] for row in rows]


def of_others(rows: Sequence[Captioned]) -> list[Captioned]:
    """Each image with the first caption that people wrote of the next one: what a model is compared with."""
    known = [row for row in rows if row.references]
    return [replace(row, caption=other.references[0]) for row, other in zip(known, known[1:] + known[:1], strict=True)]
