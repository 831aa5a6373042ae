"""Grounding with boxes: the box of what a phrase says, in the image it is about."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from xvlm import losses
from xvlm.boxes import cxcywh_to_xyxy, pairwise_iou
from xvlm.config import Configured
from xvlm.models.xvlm import XVLM
from xvlm.types import Batch, Concepts, Grounded, Regions, Texts, Words

HEADS = ("box_head",)


class GroundingConfig(Configured):
    """Weights of the losses; one of weight 0 is not computed."""

    name: Literal["grounding"] = "grounding"
    box_l1: float = 1.0
    box_giou: float = 1.0
    # The matching head learns whether a phrase is about its own box or another one of its image: what presence needs.
    itm: float = 0.0


class Task(nn.Module):
    """Fine-tuning on (image, phrase, box) (X-VLM section 4.2; reference ``models/model_bbox.py``).

    An image may have several phrases; those about all of it (``Regions.whole``) have no box to learn, as in X-VLM's
    pre-training on its region data. The model needs the heads of ``HEADS``, and where ``itm`` has a
    weight, ``itm_head``.
    """

    def __init__(self, config: GroundingConfig, model: XVLM):
        super().__init__()
        self.config, self.model = config, model

    def forward(self, batches: dict[str, Batch]) -> dict[str, Tensor]:
        """Losses by name, ``<stream>/<loss>``, already weighted."""
        named = {}
        for stream, batch in batches.items():
            for name, loss in self.losses(batch).items():
                named[f"{stream}/{name}"] = getattr(self.config, name) * loss
        return named

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Losses by name, not weighted: L1 and GIoU, and where it has a weight, matching of boxes."""
        regions, config = batch.regions, self.config
        words, boxed = self.model.encode_text(batch.texts), ~regions.whole
        concepts = self.model.encode_image(batch.images, regions if config.itm else None)
        # All texts are asked, so that a batch without a box is no special case; few are about whole images.
        of = torch.arange(len(boxed), device=boxed.device)
        at, right = regions.image, torch.ones_like(boxed)
        if config.itm:
            asked, wrong = other_boxes(regions)
            at = torch.cat([at, len(batch.images) + of, len(batch.images) + wrong])
            right, of = torch.cat([right, torch.zeros_like(asked, dtype=torch.bool)]), torch.cat([of, of, asked])
        fused = self.model.fuse(words, concepts, at, of, words.beginnings[of])
        predicted = self.model.locate(fused)[: len(boxed)]
        l1, giou = losses.box_l1_giou(predicted[boxed], regions.boxes_cxcywh[boxed])
        named = {"box_l1": l1, "box_giou": giou}
        if config.itm:
            named["itm"] = losses.matching(self.model.match(fused)[len(boxed) :], right.long())
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


def other_boxes(regions: Regions) -> tuple[Int[Tensor, "asked"], Int[Tensor, "asked"]]:
    """For each text whose image has another box, apart from its own (IoU below 0.5), the number of one at random.

    An expression that refers to one thing is not about another: these are true negatives of the matching loss.

    Returns:
        The texts that have one, and the texts whose boxes were drawn for them.
    """
    boxes_xyxy = cxcywh_to_xyxy(regions.boxes_cxcywh)
    other = (regions.image[:, None] == regions.image) & (pairwise_iou(boxes_xyxy, boxes_xyxy) < 0.5)
    other &= ~regions.whole & ~regions.whole[:, None]
    asked = other.any(1).nonzero()[:, 0]
    return asked, torch.rand(other.shape, device=other.device).masked_fill(~other, -1).argmax(1)[asked]
