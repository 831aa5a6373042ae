"""Grounding with boxes: the box of what a phrase says, in the image it is about."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from xvlm import losses
from xvlm.boxes import cxcywh_to_xyxy
from xvlm.config import Configured
from xvlm.models.xvlm import XVLM
from xvlm.types import Batch, Concepts, Grounded, Texts, Words

HEADS = ("box_head",)


class GroundingConfig(Configured):
    """Weights of the losses."""

    name: Literal["grounding"] = "grounding"
    box_l1: float = 1.0
    box_giou: float = 1.0


class Task(nn.Module):
    """Fine-tuning on (image, phrase, box) (X-VLM section 4.2; reference ``models/model_bbox.py``).

    An image may have several phrases; those about all of it (``Regions.whole``) have no box to learn, as in X-VLM's
    pre-training on its region data. The model needs the heads of ``HEADS``.
    """

    def __init__(self, config: GroundingConfig, model: XVLM):
        super().__init__()
        self.config, self.model = config, model

    def forward(self, batches: dict[str, Batch]) -> dict[str, Tensor]:
        """Losses by name, ``<stream>/<loss>``, already weighted."""
        named = {}
        for stream, batch in batches.items():
            words, boxed = self.model.encode_text(batch.texts), ~batch.regions.whole
            # All texts are asked, so that a batch without a box is no special case; few are about whole images.
            predicted = self.locate(words, self.encode(batch.images), batch.regions.image)
            l1, giou = losses.box_l1_giou(predicted[boxed], batch.regions.boxes_cxcywh[boxed])
            named[f"{stream}/box_l1"] = self.config.box_l1 * l1
            named[f"{stream}/box_giou"] = self.config.box_giou * giou
        return named

    @torch.inference_mode()
    def predict(self, batch: Batch) -> list[Grounded]:
        """A box for each text, ``xyxy`` normalised to the image."""
        return self.ground(batch.texts, self.encode(batch.images), batch.regions.image)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(self, images: Float[Tensor, "image 3 height width"]) -> Concepts:
        """What a :class:`xvlm.Grounder` keeps of images, to be asked many times."""
        return self.model.encode_image(images)

    def ground(self, texts: Texts, concepts: Concepts, about: Int[Tensor, "text"]) -> list[Grounded]:
        """A box of score 1 for each text in the image it is about, ``xyxy`` normalised to the image.

        There is no presence: the task is about phrases that are in the image.
        """
        located = cxcywh_to_xyxy(self.locate(self.model.encode_text(texts), concepts, about)).clamp(0, 1)
        return [Grounded(box[None], box.new_ones(1)) for box in located]

    def locate(self, words: Words, concepts: Concepts, about: Int[Tensor, "text"]) -> Float[Tensor, "text 4"]:
        """A box for each text, ``cxcywh`` normalised to the image."""
        return self.model.locate(self.model.fuse(words, concepts, about, only=words.beginnings))
