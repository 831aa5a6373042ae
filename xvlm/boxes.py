"""Boxes: formats, geometry, overlap, and which patches of a grid a box touches.

A box variable says its format: ``boxes_xyxy`` (left, top, right, bottom), ``boxes_xywh`` (left, top, width, height),
``boxes_cxcywh`` (centre, size). Pixels unless the docstring says otherwise; normalised boxes lie in [0, 1].
"""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor


def xywh_to_xyxy(boxes_xywh: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    x, y, w, h = boxes_xywh.unbind(-1)
    return torch.stack([x, y, x + w, y + h], -1)


def xyxy_to_xywh(boxes_xyxy: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    left, top, right, bottom = boxes_xyxy.unbind(-1)
    return torch.stack([left, top, right - left, bottom - top], -1)


def cxcywh_to_xyxy(boxes_cxcywh: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    cx, cy, w, h = boxes_cxcywh.unbind(-1)
    return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)


def xyxy_to_cxcywh(boxes_xyxy: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    left, top, right, bottom = boxes_xyxy.unbind(-1)
    return torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], -1)


def area(boxes_xyxy: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """Area of each box; a box whose right lies left of its left has none."""
    size = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clamp(min=0)
    return size[..., 0] * size[..., 1]


def iou_and_union(
    a_xyxy: Float[Tensor, "*n 4"], b_xyxy: Float[Tensor, "*n 4"]
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
    size = (torch.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:]) - torch.maximum(a_xyxy[..., :2], b_xyxy[..., :2])).clamp(0)
    intersection = size[..., 0] * size[..., 1]
    union = area(a_xyxy) + area(b_xyxy) - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny), union


def iou(a_xyxy: Float[Tensor, "*n 4"], b_xyxy: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """Intersection over union of corresponding boxes; 0 where both are empty. Broadcasts: see :func:`pairwise_iou`."""
    return iou_and_union(a_xyxy, b_xyxy)[0]


def giou(a_xyxy: Float[Tensor, "*n 4"], b_xyxy: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """Generalised IoU of corresponding boxes, in (-1, 1] (Rezatofighi et al. 2019, equation 2)."""
    overlap, union = iou_and_union(a_xyxy, b_xyxy)
    size = torch.maximum(a_xyxy[..., 2:], b_xyxy[..., 2:]) - torch.minimum(a_xyxy[..., :2], b_xyxy[..., :2])
    hull = size[..., 0] * size[..., 1]
    return overlap - (hull - union) / hull.clamp(min=torch.finfo(hull.dtype).tiny)


def pairwise_iou(a_xyxy: Float[Tensor, "n 4"], b_xyxy: Float[Tensor, "m 4"]) -> Float[Tensor, "n m"]:
    """IoU of every box of ``a`` with every box of ``b``."""
    return iou(*torch.broadcast_tensors(a_xyxy[:, None], b_xyxy[None]))


def clip(boxes_xyxy: Float[Tensor, "*n 4"], width: float, height: float) -> Float[Tensor, "*n 4"]:
    """The part of each box inside an image of the given size in pixels."""
    left, top, right, bottom = boxes_xyxy.unbind(-1)
    return torch.stack([left.clamp(0, width), top.clamp(0, height), right.clamp(0, width), bottom.clamp(0, height)], -1)


def check_inside(boxes_xyxy: Float[Tensor, "n 4"], width: int, height: int) -> None:
    """Refuse boxes that are not a part of an image of the given size in pixels.

    Raises:
        ValueError: how many leave the image, have no area or are not finite, and the first of them.
    """
    inside = (boxes_xyxy >= 0) & (boxes_xyxy <= boxes_xyxy.new_tensor([width, height, width, height]))
    good = inside.all(-1) & (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(-1)  # comparisons with NaN are false
    if not good.all():
        first = int((~good).nonzero()[0])
        raise ValueError(
            f"{int((~good).sum())} of {len(boxes_xyxy)} boxes leave the image of {width} x {height} pixels or have "
            f"no area; the first is box {first}, left top right bottom {boxes_xyxy[first].tolist()}"
        )


def merge(boxes_xyxy: Float[Tensor, "n 4"]) -> Float[Tensor, "4"]:
    """The smallest box around all the given ones (Flickr30k Entities' "merged box")."""
    return torch.cat([boxes_xyxy[:, :2].amin(0), boxes_xyxy[:, 2:].amax(0)])


def patch_mask(
    boxes_xywh: Float[Tensor, "n 4"], grid: tuple[int, int], size: tuple[int, int]
) -> Bool[Tensor, "n patch"]:
    """Which patches each box touches: X-VLM's rule (``get_image_attns``; arXiv 2111.08276, section 3.1).

    A patch belongs to a box when they overlap at all, columns ``floor(x / p)`` to ``ceil((x + w) / p)``, and every box
    has at least one patch. Width and height are taken as given and added to the corner, as the reference does, because
    rounding decides whether a box that ends on a patch border touches the next patch.

    Args:
        boxes_xywh: left, top, width, height in pixels of the resized image.
        grid: rows and columns of patches.
        size: height and width in pixels of the resized image.
    """
    rows, columns = grid
    patch_h, patch_w = size[0] / rows, size[1] / columns
    x, y, w, h = boxes_xywh.double().unbind(-1)

    def touched(start: Tensor, extent: Tensor, patch: float, n: int) -> Bool[Tensor, "n cell"]:
        first = (start / patch).floor().clamp(0, n - 1)
        last = torch.maximum(((start + extent) / patch).ceil().clamp(max=n), first + 1)
        cell = torch.arange(n, device=start.device)
        return (cell >= first[:, None]) & (cell < last[:, None])

    mask = touched(y, h, patch_h, rows)[:, :, None] & touched(x, w, patch_w, columns)[:, None, :]
    return rearrange(mask, "n row column -> n (row column)")


def patch_cover(
    boxes_xywh: Float[Tensor, "n 4"], grid: tuple[int, int], size: tuple[int, int]
) -> Float[Tensor, "n patch"]:
    """Share of each patch that each box covers, in [0, 1]; a box of no area falls back on :func:`patch_mask`."""
    rows, columns = grid

    def share(start: Tensor, extent: Tensor, patch: float, n: int) -> Float[Tensor, "n cell"]:
        edge = torch.arange(n, device=start.device) * patch
        covered = torch.minimum((start + extent)[:, None], edge + patch) - torch.maximum(start[:, None], edge)
        return covered.clamp(min=0) / patch

    x, y, w, h = boxes_xywh.float().unbind(-1)
    vertical, horizontal = share(y, h, size[0] / rows, rows), share(x, w, size[1] / columns, columns)
    cover = rearrange(vertical[:, :, None] * horizontal[:, None, :], "n row column -> n (row column)")
    return torch.where(cover.sum(1, keepdim=True) > 0, cover, patch_mask(boxes_xywh, grid, size).float())
