"""Multi-grained pre-training: contrast, match, guess hidden words and draw boxes, for captions and for regions."""

from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from xvlm import losses
from xvlm.config import Configured
from xvlm.models.xvlm import XVLM
from xvlm.types import Batch, Grounded, Texts


class LossWeights(Configured):
    """A loss of weight 0 is not computed."""

    itc: float = 1.0  # 1/processes reproduces the reference, whose gather loses that factor of the gradient
    itm: float = 1.0
    mlm: float = 1.0
    box_l1: float = 1.0
    box_giou: float = 1.0


class PretrainingConfig(Configured):
    weights: LossWeights = LossWeights()
    # Which pairs are no negatives of each other: `diagonal`, only the pair itself (X-VLM); `same_text`, also pairs
    # with the same words, because region labels repeat ("window") and a second window is no wrong answer.
    targets: Literal["diagonal", "same_text"] = "diagonal"


class Task(nn.Module):
    """The objective of X-VLM (arXiv 2111.08276, section 3.3; reference ``models/model_pretrain.py``)."""

    def __init__(self, config: PretrainingConfig, model: XVLM):
        super().__init__()
        self.config = config
        self.model = model

    def forward(self, batches: dict[str, Batch]) -> dict[str, Tensor]:
        """Losses by name, ``<stream>/<loss>``, already weighted; their sum is what is minimised."""
        with torch.no_grad():
            self.model.temperature.clamp_(0.001, 0.5)
        return {
            f"{stream}/{name}": loss for stream, batch in batches.items() for name, loss in self.losses(batch).items()
        }

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        model, weights = self.model, self.config.weights
        images, pairs = len(batch.images), len(batch.texts.ids)
        concepts = model.encode_image(batch.images, batch.regions)
        words = model.encode_text(_clean_then_masked(batch))
        pair = torch.arange(pairs, device=words.mask.device)
        clean = words.take(pair)
        image = model.embed_image(concepts.take(images + pair))
        text = model.embed_text(clean)
        same = same_texts(batch.texts) if self.config.targets == "same_text" else None
        named: dict[str, Tensor] = {}
        if weights.itc:
            named["itc"] = weights.itc * losses.contrastive(image, text, model.temperature, same)

        # Every question to the images is one row of one `fuse`: which text (clean, or pairs + t when masked) looks at
        # which concept (image i, or images + r for region r).
        boxed = (~batch.regions.whole).nonzero()[:, 0] if weights.box_l1 or weights.box_giou else pair[:0]
        masked = pair if weights.mlm and batch.masked is not None else pair[:0]
        forbidden = None if same is None else same[:, None] == same[None]
        wrong = losses.hard_negatives(image, text, model.temperature, forbidden) if weights.itm else (pair[:0],) * 4
        texts_kept, wrong_image, images_kept, wrong_text = wrong
        right = pair if weights.itm else pair[:0]
        asked = torch.cat([right, texts_kept, wrong_text, pairs + masked, boxed])
        about = torch.cat(
            [images + right, images + wrong_image, images + images_kept, images + masked, batch.regions.image[boxed]]
        )
        fused = model.fuse(words.take(asked), concepts, about)

        matched = len(right) + len(texts_kept) + len(wrong_text)
        row = torch.arange(len(asked), device=asked.device)
        if weights.itm:
            logits = model.match(fused.take(row[:matched]))
            named["itm"] = weights.itm * losses.matching(logits, (row[:matched] < len(right)).long())
        if len(masked):
            states = fused.take(row[matched : matched + len(masked)]).states
            hidden = batch.masked.hidden[batch.texts.mask]
            guesses = model.guess_words(states[hidden])
            named["mlm"] = weights.mlm * losses.masked_words(guesses, batch.texts.ids[batch.masked.hidden])
        if weights.box_l1 or weights.box_giou:
            predicted = model.locate(fused.take(row[matched + len(masked) :]))
            l1, giou = losses.box_l1_giou(predicted, batch.regions.boxes_cxcywh[boxed])
            named |= {"box_l1": weights.box_l1 * l1, "box_giou": weights.box_giou * giou}
        return named

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Grounded]:
        """A box for each text of the batch, normalised ``xyxy``, with the matching head's word on its presence."""
        from xvlm import boxes

        concepts = self.model.encode_image(batch.images)
        fused = self.model.fuse(self.model.encode_text(batch.texts), concepts, batch.regions.image)
        presence = self.model.match(fused).float().softmax(-1)[:, 1]
        located = boxes.cxcywh_to_xyxy(self.model.locate(fused).float()).clamp(0, 1)
        return [Grounded(box[None], p[None], float(p)) for box, p in zip(located, presence, strict=True)]


def _clean_then_masked(batch: Batch) -> Texts:
    """The texts, then (where words are hidden) the same texts masked: one pass of the text encoder."""
    if batch.masked is None:
        return batch.texts
    return Texts(torch.cat([batch.texts.ids, batch.masked.ids]), torch.cat([batch.texts.mask] * 2))


def same_texts(texts: Texts) -> Int[Tensor, "text"]:
    """A number per text, equal for equal words whatever the padding (a polynomial hash of the ids)."""
    position = torch.arange(texts.ids.shape[1], device=texts.ids.device)
    weight = (position + 1) * 6364136223846793005 + 1442695040888963407
    return ((texts.ids + 1) * texts.mask * weight).sum(1)
