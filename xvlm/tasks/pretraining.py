"""Multi-grained pre-training: contrast, match, guess hidden words and draw boxes, for captions and for regions."""

from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from xvlm import distributed, losses
from xvlm.boxes import cxcywh_to_xyxy
from xvlm.config import Configured
from xvlm.models.xvlm import XVLM
from xvlm.types import Batch, Concepts, Grounded, Masked, Regions, Texts, Words


class LossWeights(Configured):
    """A loss of weight 0 is not computed."""

    itc: float = 1.0  # 1/processes reproduces the reference, whose gather loses that factor of the gradient
    itm: float = 1.0
    mlm: float = 1.0
    box_l1: float = 1.0
    box_giou: float = 1.0


class PretrainingConfig(Configured):
    weights: LossWeights = LossWeights()
    # Which concepts and texts of a batch belong together: `diagonal`, only the pairs themselves (X-VLM); `known`, also
    # pairs with the same words, because region labels repeat ("window") and a second window is no wrong answer, and
    # pairs about the same box of the same image, whose texts fit it both.
    targets: Literal["diagonal", "known"] = "diagonal"
    contrast: Literal["softmax", "sigmoid"] = "softmax"  # X-VLM's, or SigLIP's
    # Wrong partners for the matching loss are drawn among the texts of so many neighbouring images, on any number of
    # processes and turns; null: among all texts of a process (X-VLM) or turn.
    negatives_among: Annotated[int, Field(ge=1)] | None = None


class Task(nn.Module):
    """The objective of X-VLM (arXiv 2111.08276, section 3.3; reference ``models/model_pretrain.py``)."""

    def __init__(self, config: PretrainingConfig, model: XVLM):
        super().__init__()
        self.config = config
        self.model = model
        if config.contrast == "sigmoid":
            self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, batches: dict[str, Batch]) -> dict[str, Tensor]:
        """Losses by name, ``<stream>/<loss>``, already weighted; their sum is what is minimised."""
        with torch.no_grad():
            self.model.temperature.clamp_(0.001, 0.5)
        return {
            f"{stream}/{name}": loss
            for stream, batch in batches.items()
            for name, loss in self.losses(batch, boxes=stream != "caption").items()
        }

    def losses(self, batch: Batch, *, boxes: bool) -> dict[str, Tensor]:
        """The losses of one batch; ``boxes``: whether it holds regions, which have a box to predict."""
        model, weights = self.model, self.config.weights
        concepts = model.encode_image(batch.images, batch.regions)
        masked = batch.masked if weights.mlm else None
        words = model.encode_text(batch.texts if masked is None else _clean_then_masked(batch.texts, masked))
        pair = torch.arange(len(batch.texts.ids), device=words.mask.device)
        part = len(batch.images) + pair  # concepts: the images first, then what each text is about
        image, text = model.embed_image(concepts.take(part)), model.embed_text(words)[: len(pair)]
        same = None
        if self.config.targets == "known":
            same = torch.stack([same_texts(batch.texts), same_places(batch.regions)], 1)
        named: dict[str, Tensor] = {}
        if weights.itc:
            named["itc"] = weights.itc * self.contrast(image, text, same)

        # Every question to the images is one row of one `fuse`: which text, which concept, which words are wanted.
        asked = _Questions(words)
        if weights.itm:
            forbidden = None if same is None else losses.matches(same)
            groups = None if self.config.negatives_among is None else self.groups(batch)
            negatives = losses.hard_negatives(image, text, model.temperature, forbidden, groups)
            texts, wrong_image, images, wrong_text = negatives
            match = asked.add(torch.cat([pair, texts, wrong_text]), part[torch.cat([pair, wrong_image, images])])
        if masked is not None:
            guess = asked.add(len(pair) + pair, part, masked.hidden)
        if boxes and (weights.box_l1 or weights.box_giou):
            boxed = (~batch.regions.whole).nonzero()[:, 0]
            locate = asked.add(boxed, batch.regions.image[boxed])
        fused = asked.fuse(model, concepts)

        if weights.itm:
            logits = model.match(fused.take(match))
            named["itm"] = weights.itm * losses.matching(logits, (match < len(pair)).long())
        if masked is not None:
            guesses = model.guess_words(fused.take(guess).states)
            named["mlm"] = weights.mlm * losses.masked_words(guesses, batch.texts.ids[masked.hidden])
        if boxes and (weights.box_l1 or weights.box_giou):
            predicted = model.locate(fused.take(locate))
            l1, giou = losses.box_l1_giou(predicted, batch.regions.boxes_cxcywh[boxed])
            named |= {"box_l1": weights.box_l1 * l1, "box_giou": weights.box_giou * giou}
        return named

    def contrast(self, image: Tensor, text: Tensor, same: Tensor | None) -> Float[Tensor, ""]:
        if self.config.contrast == "sigmoid":
            return losses.sigmoid_contrastive(image, text, self.model.temperature, self.bias, same)
        return losses.contrastive(image, text, self.model.temperature, same)

    def groups(self, batch: Batch) -> Int[Tensor, "text"]:
        """Which of the run's groups of ``negatives_among`` images each text belongs to."""
        if batch.places is None:
            raise ValueError("task.negatives_among needs batches whose images have places in the run")
        return (batch.places // self.config.negatives_among)[batch.regions.image]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(self, images: Float[Tensor, "image 3 height width"]) -> Concepts:
        """What a grounder keeps of images, to be asked many times."""
        return self.model.encode_image(images)

    def ground(self, texts: Texts, concepts: Concepts, about: Int[Tensor, "text"]) -> list[Grounded]:
        """A box for each text in the image it is about, ``xyxy`` normalised to the image; box head and matching head.

        Args:
            about: which of the encoded images each text is about.
        """
        fused = self.model.fuse(self.model.encode_text(texts), concepts, about)
        presence = self.model.match(fused).float().softmax(-1)[:, 1]
        located = cxcywh_to_xyxy(self.model.locate(fused).float()).clamp(0, 1)
        return [Grounded(box[None], p[None], float(p)) for box, p in zip(located, presence, strict=True)]


class _Questions:
    """Rows of one ``fuse``: collected first, asked together, answers found by their row numbers."""

    def __init__(self, words: Words):
        self.words = words
        self.of: list[Tensor] = []
        self.about: list[Tensor] = []
        self.wanted: list[Tensor] = []
        self.count = 0

    def add(
        self, of: Int[Tensor, "row"], about: Int[Tensor, "row"], wanted: Bool[Tensor, "row word"] | None = None
    ) -> Int[Tensor, "row"]:
        """Text ``of`` about concept ``about``; its [CLS] is wanted, or the ``wanted`` words. Returns the rows."""
        self.of.append(of)
        self.about.append(about)
        self.wanted.append(self.words.beginnings[of] if wanted is None else wanted)
        self.count += len(of)
        return torch.arange(self.count - len(of), self.count, device=of.device)

    def fuse(self, model: XVLM, concepts: Concepts) -> Words | None:
        if not self.of:
            return None
        return model.fuse(self.words, concepts, torch.cat(self.about), torch.cat(self.of), torch.cat(self.wanted))


def _clean_then_masked(texts: Texts, masked: Masked) -> Texts:
    """The texts, then the same texts with words hidden: one pass of the text encoder."""
    return Texts(torch.cat([texts.ids, masked.ids]), torch.cat([texts.mask] * 2))


def same_texts(texts: Texts) -> Int[Tensor, "text"]:
    """A number per text, equal for equal words whatever the padding (a polynomial hash of the ids)."""
    return _hash((texts.ids + 1) * texts.mask)


def same_places(regions: Regions) -> Int[Tensor, "text"]:
    """A number per text, equal for texts about the same box of the same image, different between processes."""
    thousandths = (regions.boxes_xywh * 1000).round().long()
    process = torch.full_like(regions.image, distributed.world().rank)
    return _hash(torch.cat([torch.stack([process, regions.image], 1), thousandths], 1))


def _hash(numbers: Int[Tensor, "row number"]) -> Int[Tensor, "row"]:
    multiplier = torch.full((numbers.shape[1],), 6364136223846793005, device=numbers.device)
    return (numbers * multiplier.cumprod(0)).sum(1)  # powers, modulo 2^64
