"""Grounding without boxes: where the matching head looks, words to patches, decides among proposed boxes.

X-VLM's weakly supervised grounding (arXiv 2111.08276, section 4.2; reference ``Grounding.py``) after ALBEF: the
gradient of the matching logit says which attention mattered, and a box is scored by the heat inside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from xvlm import boxes
from xvlm.config import Configured
from xvlm.data.processor import Processor
from xvlm.models.attached import Attached
from xvlm.models.xvlm import XVLM
from xvlm.types import Concepts, Grounded, Proposals, Texts, Words


class GradCAMConfig(Configured):
    # Of the cross encoder; null: the middle, 3 of 6, X-VLM's block 9. ALBEF's best is 2, its block 8.
    layer: Annotated[int, Field(ge=0)] | None = None
    # A box is worth its heat over area ** alpha: 0 prefers the largest, 1 the densest.
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    # How heat in a box is summed: `cells` are constant densities, partly covered ones count by their share; `pixels` is
    # the reference: bicubic enlargement to the image, summed between truncated edges.
    pool: Literal["cells", "pixels"] = "cells"
    # Without proposals: the box around the cells that are at least so hot, as a share of the hottest.
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.5


class BestLayer(Attached):
    """The cross layer whose heat fits true boxes best, as ``xvlm layers`` found."""

    FILE = "gradcam.json"
    layer: Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Seen:
    """Encoded images and, for each, the boxes to choose among; none where they are found by the heat itself."""

    concepts: Concepts
    proposals: Sequence[Proposals] | None = None


class GradCAM(nn.Module):
    """A grounder for any model with a matching head."""

    def __init__(self, config: GradCAMConfig, model: XVLM):
        super().__init__()
        if "itm_head" not in model.config.heads:
            raise ValueError("gradcam follows the matching head, and the model has no itm_head")
        layers = len(model.cross.layers)
        self.layer = layers // 2 if config.layer is None else config.layer
        if self.layer >= layers:
            raise ValueError(f"gradcam.layer is {self.layer}, but the cross encoder has {layers} layers, from 0 on")
        self.config, self.model = config, model

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(
        self, images: Float[Tensor, "image 3 height width"], proposals: Sequence[Proposals] | None = None
    ) -> Seen:
        """What a :class:`xvlm.Grounder` keeps of images: patches, and the boxes proposed for each."""
        return Seen(self.model.encode_image(images), proposals)

    def ground(self, texts: Texts, seen: Seen, about: Int[Tensor, "text"]) -> list[Grounded]:
        """The proposals for each text's image, best first; ``xyxy`` normalised to the image.

        ``scores`` order the boxes of one text and mean nothing between texts; ``presence`` is the matching head's.
        Where nothing is proposed for an image, the answer is the box around the heat.
        """
        heat, presence = heat_maps(self.model, texts, seen.concepts, about, self.layer)
        found = []
        for each, p, image in zip(heat, presence.tolist(), about.tolist(), strict=True):
            proposed = None if seen.proposals is None else seen.proposals[image].to(heat.device)
            if proposed is None or len(proposed.boxes_xyxy) == 0:
                around = box_around(each, self.config.threshold)
                found.append(Grounded(around[None], around.new_ones(1), p, heat=each))
                continue
            scores = score(each, proposed, self.config.alpha, self.config.pool)
            order = scores.argsort(descending=True, stable=True)
            size = scores.new_tensor(proposed.size * 2)
            found.append(Grounded((proposed.boxes_xyxy / size)[order], scores[order], p, heat=each))
        return found


def heat_maps(
    model: XVLM,
    texts: Texts,
    concepts: Concepts,
    about: Int[Tensor, "text"],
    layer: int,
    words: Bool[Tensor, "text word"] | None = None,
) -> tuple[Float[Tensor, "text row column"], Float[Tensor, "text"]]:
    """The mean of :func:`token_maps` over the words of each text.

    Args:
        words: whose attention counts; where none of a text does, all do. All, [CLS] among them, if not given (X-VLM,
            whose mean also counts the padding: the same order within a text).

    Returns:
        A map per text over the grid of patches, and the probability that text and image match.
    """
    heat, match = token_maps(model, texts, concepts, about, layer)
    counted = texts.mask if words is None else texts.mask & (words | ~(texts.mask & words).any(1, keepdim=True))
    return Words(heat[counted[texts.mask]].flatten(1), counted).mean.unflatten(1, concepts.grid), match


def word_maps(
    model: XVLM, processor: Processor, phrase: str, concepts: Concepts, layer: int
) -> list[tuple[str, Float[Tensor, "row column"]]]:
    """Each word of a phrase about one image, [CLS] first, with its map: of several tokens their mean."""
    ids, continues = processor.encode(phrase)
    texts = processor.pad([ids]).to(concepts.patches.device)
    heat, _ = token_maps(model, texts, concepts, torch.zeros_like(texts.ids[:, 0]), layer)
    starts = [i for i, goes_on in enumerate(continues) if not goes_on]
    spans = zip(starts, [*starts[1:], len(ids)], strict=True)
    return [(processor.tokenizer.decode(ids[start:end]), heat[start:end].mean(0)) for start, end in spans]


def token_maps(
    model: XVLM, texts: Texts, concepts: Concepts, about: Int[Tensor, "text"], layer: int
) -> tuple[Float[Tensor, "token row column"], Float[Tensor, "text"]]:
    """Grad-CAM of the matching logit at a cross layer: attention times its positive gradient, mean of heads.

    No parameter's ``.grad`` is touched, and parameters need no gradient. Only the layers from ``layer`` up are walked
    back.

    Returns:
        A map per token, text after text, over the grid of patches; the probability that each text matches its image.

    Raises:
        RuntimeError: in inference mode, which has no gradients; or the model is in training mode, whose dropout would
            be part of the answer.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("Grad-CAM needs a gradient, and inference mode has none: use torch.no_grad() around it")
    if model.training:
        raise RuntimeError("Grad-CAM needs the model in evaluation mode: call model.eval()")
    with torch.no_grad():
        said = model.encode_text(texts)
    with torch.enable_grad():
        try:
            logits = model.match(model.fuse(said, concepts, about, keep_map=layer))
        finally:
            attention = model.cross.layers[layer].cross_attention.take_map()
        (gradient,) = torch.autograd.grad(logits[:, 1].float().sum(), attention)
    heat = (attention.detach() * gradient.clamp(min=0)).mean(1)[:, 1:].float()  # without the pooled token's share
    return heat.unflatten(1, concepts.grid), logits.detach().float().softmax(-1)[:, 1]


def score(
    heat: Float[Tensor, "row column"], proposed: Proposals, alpha: float, pool: Literal["cells", "pixels"] = "cells"
) -> Float[Tensor, "box"]:
    """What each proposal is worth: the proposer's confidence times heat inside over area to the power of alpha."""
    inside = heat_in_cells(heat, proposed) if pool == "cells" else heat_in_pixels(heat, proposed)
    return proposed.scores * inside / boxes.area(proposed.boxes_xyxy).clamp(min=1e-6) ** alpha


def heat_in_cells(heat: Float[Tensor, "row column"], proposed: Proposals) -> Float[Tensor, "box"]:
    """Heat inside each box; each cell of the grid is a constant density, of which a box has the share it covers."""
    width, height = proposed.size
    cover = boxes.patch_cover(boxes.xyxy_to_xywh(proposed.boxes_xyxy), tuple(heat.shape), (height, width))
    return cover @ heat.flatten()


def heat_in_pixels(heat: Float[Tensor, "row column"], proposed: Proposals) -> Float[Tensor, "box"]:
    """Heat inside each box as the reference sums it (``grounding_eval``): bicubic to pixels, edges truncated."""
    width, height = proposed.size
    enlarged = F.interpolate(heat[None, None], (height, width), mode="bicubic", align_corners=False)[0, 0].double()
    sums = F.pad(enlarged.cumsum(0).cumsum(1), (1, 0, 1, 0))  # entry (y, x): everything above y and left of x
    limit = torch.tensor([width, height, width, height], device=heat.device)
    left, top, right, bottom = proposed.boxes_xyxy.long().clamp(min=0).minimum(limit).unbind(1)
    return (sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]).float()


def box_around(heat: Float[Tensor, "row column"], threshold: float) -> Float[Tensor, "4"]:
    """The box, ``xyxy`` normalised, around all cells at least ``threshold`` times as hot as the hottest.

    A map without heat gives the whole image.
    """
    hot = (heat >= threshold * heat.max()) & (heat.max() > 0)
    if not hot.any():
        return heat.new_tensor([0.0, 0.0, 1.0, 1.0])
    rows, columns = hot.any(1).nonzero()[:, 0], hot.any(0).nonzero()[:, 0]
    edges = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return edges / heat.new_tensor([heat.shape[1], heat.shape[0]] * 2)
