"""Figures of merit as functions: what a model said and what is true in, shares between 0 and 1 out."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xvlm import boxes


def recall_at_k(
    scores: Float[Tensor, "image text"], text_image: Int[Tensor, "text"], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Retrieval in both directions: how often the right one is among the first k (X-VLM ``itm_eval``).

    Image to text counts the best of the image's own texts; images without a text are no queries. The rank of the truth
    is 1 + those that score higher + half of those that score the same, so that a model that scores everything alike
    finds nothing. A truth that was not scored (-inf, as re-ranking leaves most) is not found at any k.

    Args:
        scores: higher is more alike; -inf where a pair was not scored.
        text_image: row of the image that each text is about.

    Returns:
        ``image_to_text_r{k}`` and ``text_to_image_r{k}`` for every k.

    Raises:
        ValueError: NaN among the scores, a text of no image, or nothing to score.
    """
    n_images, n_texts = scores.shape
    if n_texts == 0:
        raise ValueError("scores: no texts to score")
    if scores.isnan().any():
        raise ValueError(f"scores: {int(scores.isnan().sum())} of {scores.numel()} are NaN")
    if text_image.min() < 0 or text_image.max() >= n_images:
        raise ValueError(f"text_image: {int(text_image.min())} to {int(text_image.max())}, but {n_images} images")

    own = text_image == torch.arange(n_images, device=scores.device)[:, None]
    text_rank = ranks(scores.T, own.T)
    image_rank = ranks(scores, own)[own.any(1)]

    recalls = {f"image_to_text_r{k}": (image_rank <= k).double().mean().item() for k in ks}
    return recalls | {f"text_to_image_r{k}": (text_rank <= k).double().mean().item() for k in ks}


def ranks(scores: Float[Tensor, "query candidate"], own: Bool[Tensor, "query candidate"]) -> Float[Tensor, "query"]:
    """Rank of each query's best true candidate; other true candidates of the same score do not count against it.

    Args:
        own: the true candidates; where a query has none, or none with a score, its rank is infinite.
    """
    truth = scores.masked_fill(~own, -torch.inf).amax(1)
    higher = (scores > truth[:, None]).sum(1)
    ties = ((scores == truth[:, None]) & ~own).sum(1)
    return torch.where(truth == -torch.inf, torch.inf, 1 + higher + ties / 2)


def grounding_accuracy(
    predicted_xyxy: Float[Tensor, "n 4"], target_xyxy: Float[Tensor, "n 4"], threshold: float = 0.5
) -> float:
    """Share of boxes whose IoU with the true one is at least ``threshold`` (Acc@0.5 of referring expressions)."""
    _require_some(len(predicted_xyxy))
    return (boxes.iou(predicted_xyxy, target_xyxy) >= threshold).double().mean().item()


def mean_iou(predicted_xyxy: Float[Tensor, "n 4"], target_xyxy: Float[Tensor, "n 4"]) -> float:
    """Mean IoU of corresponding boxes."""
    _require_some(len(predicted_xyxy))
    return boxes.iou(predicted_xyxy, target_xyxy).double().mean().item()


def overall_iou(predicted_xyxy: Float[Tensor, "n 4"], target_xyxy: Float[Tensor, "n 4"]) -> float:
    """Sum of the intersections over the sum of the unions of corresponding boxes (oIoU): large boxes weigh more."""
    _require_some(len(predicted_xyxy))
    overlap, union = boxes.iou_and_union(predicted_xyxy.double(), target_xyxy.double())
    return ((overlap * union).sum() / union.sum()).item()


def phrase_grounding(
    predicted_xyxy: Float[Tensor, "n 4"], targets_xyxy: Sequence[Float[Tensor, "_ 4"]], threshold: float = 0.5
) -> dict[str, float]:
    """Phrase grounding where a phrase may name several boxes (Flickr30k Entities), by both rules in use.

    Returns:
        ``any_box_acc``: share of phrases whose predicted box has IoU >= threshold with one of the phrase's boxes;
        ``merged_box_acc``: with the box around all of them. The two do not order: each finds phrases the other misses.

    Raises:
        ValueError: a phrase without boxes (it cannot be scored: leave it out), unequal counts, or nothing to score.
    """
    _require_some(len(predicted_xyxy))
    if len(predicted_xyxy) != len(targets_xyxy):
        raise ValueError(f"{len(predicted_xyxy)} predicted boxes, but targets of {len(targets_xyxy)} phrases")
    any_box = merged_box = 0
    for i, (predicted, targets) in enumerate(zip(predicted_xyxy, targets_xyxy, strict=True)):
        if len(targets) == 0:
            raise ValueError(f"targets_xyxy[{i}]: no boxes; leave phrases out that were not drawn")
        any_box += bool((boxes.iou(predicted.expand_as(targets), targets) >= threshold).any())
        merged_box += bool(boxes.iou(predicted, boxes.merge(targets)) >= threshold)
    return {"any_box_acc": any_box / len(targets_xyxy), "merged_box_acc": merged_box / len(targets_xyxy)}


def presence(
    probability: Float[Tensor, "phrase"], present: Bool[Tensor, "phrase"], threshold: float, bins: int = 15
) -> dict[str, float]:
    """Whether phrases that name nothing in the image are told from those that do (gRefCOCO; Liu et al. 2023).

    Returns:
        ``n_acc``: share of phrases without a target that are below the threshold; ``t_acc``: share of those with one
        that are not; ``calibration_error``: how far probabilities are from frequencies, mean over phrases, in bins of
        equal width (ECE; Guo et al. 2017, equation 3); ``absent``: share of phrases without a target.

    Raises:
        ValueError: phrases of one kind only.
    """
    if present.all() or not present.any():
        raise ValueError(f"presence: {int(present.sum())} of {len(present)} phrases have a target; expected both kinds")
    said = probability >= threshold
    bin_of = (probability * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.double).index_add(0, bin_of, (probability - present.double()).double())
    return {
        "n_acc": (~said[~present]).double().mean().item(),
        "t_acc": said[present].double().mean().item(),
        "calibration_error": gap.abs().sum().item() / len(present),
        "absent": (~present).double().mean().item(),
    }


def generalized_grounding(
    predicted_xyxy: Float[Tensor, "phrase 4"],
    said: Bool[Tensor, "phrase"],
    targets_xyxy: Sequence[Float[Tensor, "_ 4"]],
    threshold: float = 0.5,
) -> dict[str, float]:
    """gRefCOCO's protocol for boxes (GREC; He et al. 2023), for at most one box a phrase.

    A phrase is right where its F1 is 1: nothing is predicted of a phrase without a target, or the only target is met.
    The paper asks for an IoU of at least 0.5; the authors' script (``mdetr/datasets/refexp.py``) for a generalised IoU,
    which is never larger. A phrase of several targets cannot be right with one box.

    Args:
        said: whether the box counts as an answer; else the phrase is said to have no target.
        targets_xyxy: the boxes of each phrase, none where it has no target.

    Returns:
        ``f1_precision`` and ``f1_precision_giou``: share of phrases that are right; ``several``: share of phrases with
        more than one target.
    """
    _require_some(len(predicted_xyxy))
    counts = [len(targets) for targets in targets_xyxy]
    right = {"f1_precision": 0, "f1_precision_giou": 0}
    for predicted, answered, targets in zip(predicted_xyxy, said.tolist(), targets_xyxy, strict=True):
        for name, overlap in (("f1_precision", boxes.iou), ("f1_precision_giou", boxes.giou)):
            met = len(targets) == 1 and bool(overlap(predicted, targets[0]) >= threshold)
            right[name] += met if answered else len(targets) == 0
    shares = {name: count / len(counts) for name, count in right.items()}
    return shares | {"several": sum(count > 1 for count in counts) / len(counts)}


def pointing(heat: Float[Tensor, "row column"], box_xyxy: Float[Tensor, "4"]) -> float:
    """The pointing game (Zhang et al. 2016) on a grid: is the middle of the hottest cell in the box?

    Args:
        box_xyxy: normalised to the image.

    Returns:
        1 or 0; where several cells are equally hot, the share of them; 0 of a map without heat.
    """
    if not heat.max() > 0:
        return 0.0
    rows, columns = (heat == heat.max()).nonzero().unbind(1)
    y, x = (rows + 0.5) / heat.shape[0], (columns + 0.5) / heat.shape[1]
    left, top, right, bottom = box_xyxy.to(heat.device)
    return ((left <= x) & (x < right) & (top <= y) & (y < bottom)).double().mean().item()


def energy_in_box(heat: Float[Tensor, "row column"], box_xyxy: Float[Tensor, "4"]) -> float:
    """Share of a map's positive heat that lies in a box; cells count by the part that the box covers.

    Args:
        box_xyxy: normalised to the image.

    Returns:
        Between 0 and 1; 0 of a map without heat.
    """
    heat = heat.clamp(min=0)
    cover = boxes.patch_cover(boxes.xyxy_to_xywh(box_xyxy.to(heat.device))[None], tuple(heat.shape), (1, 1))[0]
    return ((cover * heat.flatten()).sum() / heat.sum().clamp(min=torch.finfo(heat.dtype).tiny)).item()


def choice_accuracy(scores: Sequence[Float[Tensor, "_ _"]]) -> dict[str, float]:
    """Telling the regions of an image apart: pick the text of a region, and the region of a text.

    Args:
        scores: per image a square matrix, regions down and their texts across; text i is of region i. Regions of equal
            texts should have been dropped, since they cannot be told apart.

    Returns:
        ``region_to_text`` and ``text_to_region``: share of right choices over all regions of all images, a choice
        between n equal scores counting 1/n; ``chance``: what equal scores would get.

    Raises:
        ValueError: a matrix that is not square or has NaN, or nothing to score.
    """
    _require_some(sum(len(matrix) for matrix in scores))
    right = {"region_to_text": 0.0, "text_to_region": 0.0}
    for i, matrix in enumerate(scores):
        if matrix.shape[0] != matrix.shape[1] or matrix.isnan().any():
            raise ValueError(f"scores[{i}]: expected a square matrix of numbers, found {tuple(matrix.shape)} or NaN")
        if len(matrix):
            right["region_to_text"] += _chosen(matrix)
            right["text_to_region"] += _chosen(matrix.T)
    count = sum(len(matrix) for matrix in scores)
    chance = sum(len(matrix) > 0 for matrix in scores) / count
    return {direction: total / count for direction, total in right.items()} | {"chance": chance}


def _chosen(matrix: Float[Tensor, "n n"]) -> float:
    best = matrix == matrix.amax(1, keepdim=True)
    return (best.diagonal() / best.sum(1)).sum().item()


def _require_some(count: int) -> None:
    if count == 0:
        raise ValueError("nothing to score: no boxes, phrases or regions were given")
