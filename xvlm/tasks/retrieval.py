"""Image-text retrieval: contrast and matching, where the captions of one image are right answers to each other."""

from hashlib import blake2b
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from xvlm import losses
from xvlm.config import Configured
from xvlm.models.xvlm import XVLM
from xvlm.types import Batch

HEADS = ("image_projection", "text_projection", "temperature", "itm_head")


class RetrievalConfig(Configured):
    """Weights of the losses (one of weight 0 is not computed), and how the model is asked."""

    name: Literal["retrieval"] = "retrieval"
    itc: float = 1.0  # 1/processes reproduces the reference, whose gather loses that factor of the gradient
    itm: float = 1.0
    captions: Annotated[int, Field(ge=1)] = 5  # of each image in the gallery, the first ones
    top_k: Annotated[int, Field(ge=1)] = 128  # candidates by contrast that the matching head re-ranks


class Task(nn.Module):
    """Fine-tuning on (image, caption) pairs (X-VLM section 4.2; reference ``models/model_retrieval.py``).

    The model needs the heads of ``HEADS``. Unlike in pre-training, the temperature is not held within bounds.
    """

    def __init__(self, config: RetrievalConfig, model: XVLM):
        super().__init__()
        self.config, self.model = config, model

    def forward(self, batches: dict[str, Batch]) -> dict[str, Tensor]:
        """Losses by name, ``<stream>/<loss>``, already weighted; ``Batch.ids`` name the images, equal ones are one."""
        return {
            f"{stream}/{name}": loss for stream, batch in batches.items() for name, loss in self.losses(batch).items()
        }

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        model, config, about = self.model, self.config, batch.regions.image
        concepts, words = model.encode_image(batch.images), model.encode_text(batch.texts)
        image, text = model.embed_image(concepts)[about], model.embed_text(words)
        same = image_numbers(batch.ids)[:, None].to(about.device)[about]
        named: dict[str, Tensor] = {}
        if config.itc:
            named["itc"] = config.itc * losses.contrastive(image, text, model.temperature, same)
        if config.itm:
            negatives = losses.hard_negatives(image, text, model.temperature, losses.matches(same))
            texts, wrong_image, images, wrong_text = negatives
            pair = torch.arange(len(about), device=about.device)
            of, at = torch.cat([pair, texts, wrong_text]), about[torch.cat([pair, wrong_image, images])]
            logits = model.match(model.fuse(words, concepts, at, of, words.beginnings[of]))
            right = torch.arange(len(of), device=of.device) < len(pair)
            named["itm"] = config.itm * losses.matching(logits, right.long())
        return named

    @torch.inference_mode()
    def predict(self, batch: Batch) -> Float[Tensor, "text"]:
        """Probability that each text belongs to the image it is paired with; see :func:`xvlm.evaluate.rank`."""
        words, concepts = self.model.encode_text(batch.texts), self.model.encode_image(batch.images)
        fused = self.model.fuse(words, concepts, batch.regions.image, only=words.beginnings)
        return self.model.match(fused).float().softmax(-1)[:, 1]


def image_numbers(ids: tuple[str, ...]) -> Int[Tensor, "image"]:
    """A number per image, equal for equal names on every process (Python's own hash is not)."""
    return torch.tensor([int.from_bytes(blake2b(name.encode(), digest_size=7).digest(), "big") for name in ids])
