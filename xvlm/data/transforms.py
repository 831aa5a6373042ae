"""Augmentation in which a sample's image, boxes, masks and words move together.

Everything random is drawn from the ``random.Random`` passed in.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from random import Random
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from pydantic import Field
from torch import Tensor

from xvlm import boxes
from xvlm.config import Configured
from xvlm.data import fast_pixels, pixels, randaugment
from xvlm.data.fast_pixels import Crop
from xvlm.data.images import rgb

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class AugmentConfig(Configured):
    """What happens to a training image; defaults are X-VLM's for captions, apart from the words of a flipped image."""

    # `random_resized`: area within `scale`, width over height within `ratio`; `keep_box`: any crop around one box
    crop: Literal["none", "random_resized", "keep_box"] = "random_resized"
    scale: tuple[Positive, Positive] = (0.2, 1.0)
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    hflip: Share = 0.5
    # where a text says left or right: `ignore` flips all the same (X-VLM), `skip` does not flip, whatever it means,
    # `swap` swaps the words where they are sides
    flip_words: Literal["ignore", "skip", "swap"] = "swap"
    randaugment: Literal["none", "full", "colour"] = "full"  # `colour` is `full` without what moves pixels
    min_visible: Share = 0.5  # a box stays if more than this share of it is in the crop (min_perc_in_image)
    # `exact`: as in X-VLM; `fast`: JPEGs decoded at 1/2, 1/4 or 1/8 where that is large enough, and resized, sharpened
    # and moved by vector code; how much the pixels differ is in docs/data.md
    pixels: Literal["exact", "fast"] = "exact"


@dataclass(frozen=True)
class Augmented:
    """An image with the boxes that are still to be seen in it: ``boxes_xywh[j]`` was box ``kept[j]``."""

    pixels: UInt8[Tensor, "3 height width"]
    boxes_xywh: Float[Tensor, "kept 4"]  # in these pixels, float64
    kept: list[int]
    texts: list[str]
    masks: Bool[Tensor, "kept height width"] | None = None


def augment(
    image: Image.Image,
    boxes_xyxy: Float[Tensor, "n 4"],
    texts: Sequence[str],
    keep: int | None,
    config: AugmentConfig,
    size: tuple[int, int],
    rng: Random,
    interpolation: Image.Resampling = Image.Resampling.BICUBIC,
    masks: Bool[Tensor, "n height width"] | None = None,
) -> Augmented:
    """Crop, flip, resize (aspect not kept) and RandAugment, in the order of the reference's ``RegionTextJsonDataset``.

    Args:
        image: perhaps one that is not decoded yet (:func:`xvlm.data.images.open_image`).
        boxes_xyxy: in pixels of ``image``.
        texts: all that is said about the image; returned with left and right swapped where the flip asks for it.
        keep: the box that a ``keep_box`` crop contains; None: there is no box to keep, and no crop.
        size: height and width of the result.
        masks: one for each box, of ``image``'s size; they follow it to the nearest pixel.

    Raises:
        Undecodable: (a ValueError) the image, as :func:`xvlm.data.images.rgb`.
    """
    crop = choose_crop(image.size, None if keep is None else boxes_xyxy[keep].tolist(), config, rng)
    flip = rng.random() < config.hflip
    if flip and config.flip_words == "skip":
        flip = not any(SIDES.search(text) for text in texts)
    if flip and config.flip_words == "swap":
        texts = [swap_sides(text) for text in texts]
    operations = randaugment.draw(config.randaugment, rng)
    if config.pixels == "fast":
        crop, scale = fast_pixels.shrink(image, crop, size)
        seen = fast_pixels.render(image, crop, scale, flip, size, operations, interpolation)
    else:
        seen = pixels.render(rgb(image), crop, flip, size, operations, interpolation)
    boxes_xywh, visible = place_boxes(boxes_xyxy, crop, flip, size)
    steps = [randaugment.affine_of(step, (size[1], size[0])) for step in operations if step.moves]
    if steps:
        boxes_xywh, still = move_boxes(boxes_xywh, reduce(_compose, steps), size)
        visible = visible * still
    kept = (visible > config.min_visible).nonzero()[:, 0]
    if masks is not None:
        masks = move_masks(masks[kept], crop, flip, size, steps)
    return Augmented(seen, boxes_xywh[kept], kept.tolist(), list(texts), masks)


# Crops.


def choose_crop(size: tuple[int, int], box_xyxy: Sequence[float] | None, config: AugmentConfig, rng: Random) -> Crop:
    """A crop of an image of ``size`` (width, height); ``box_xyxy`` is the one that ``keep_box`` keeps."""
    if config.crop == "random_resized":
        return random_resized_crop(size, config.scale, config.ratio, rng)
    if config.crop == "keep_box" and box_xyxy is not None:
        return crop_around(size, box_xyxy, rng)
    return (0, 0, *size)


def crop_around(size: tuple[int, int], box_xyxy: Sequence[float], rng: Random) -> Crop:
    """Each border anywhere between the box and the edge of the image (reference ``RegionTextJsonDataset``)."""
    width, height = size
    left, top, right, bottom = box_xyxy
    return (
        rng.randint(0, math.floor(left)),
        rng.randint(0, math.floor(top)),
        rng.randint(min(math.ceil(right), width), width),
        rng.randint(min(math.ceil(bottom), height), height),
    )


def random_resized_crop(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: Random
) -> Crop:
    """Area and aspect ratio at random (Szegedy et al. 2015): ten tries, then the largest central crop that fits."""
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


# Boxes.


def place_boxes(
    boxes_xyxy: Float[Tensor, "n 4"], crop: Crop, flip: bool, size: tuple[int, int]
) -> tuple[Float[Tensor, "n 4"], Float[Tensor, "n"]]:
    """Where boxes lie after cropping, mirroring the crop and resizing it; and which share of each is in the crop.

    In float64, and corner and size are scaled separately, as in the reference: rounding decides which patches a box
    touches.

    Args:
        boxes_xyxy: in pixels of the image before.
        size: height and width after.

    Returns:
        Visible parts as ``xywh`` in pixels of the image after, and shares in [0, 1].
    """
    left, top, right, bottom = crop
    width, height = right - left, bottom - top
    whole = boxes_xyxy.double()
    corner, end = whole.new_tensor([left, top]), whole.new_tensor([right, bottom])
    first, last = torch.maximum(whole[:, :2], corner), torch.minimum(whole[:, 2:], end)
    extent = (last - first).clamp(min=0)
    visible = extent.prod(1) / (whole[:, 2:] - whole[:, :2]).prod(1)
    x, y = (first - corner).unbind(1)
    w, h = extent.unbind(1)
    if flip:
        x = width - x - w
    across, down = size[1] / width, size[0] / height
    return torch.stack([across * x, down * y, across * w, down * h], 1), visible


def move_boxes(
    boxes_xywh: Float[Tensor, "n 4"], affine: Float[np.ndarray, "2 3"], size: tuple[int, int]
) -> tuple[Float[Tensor, "n 4"], Float[Tensor, "n"]]:
    """Upright boxes around what an affine map of the image makes of boxes, clipped; and the share that is left of each.

    Args:
        boxes_xywh: in pixels of an image of ``size`` (height, width), which the map does not change.
    """
    x, y, w, h = boxes_xywh.double().unbind(1)
    corners = torch.stack([torch.stack([x + i * w, y + j * h, torch.ones_like(x)], 1) for i in (0, 1) for j in (0, 1)])
    moved = corners @ torch.from_numpy(affine).T
    hull = torch.cat([moved.amin(0), moved.amax(0)], 1)
    inside = boxes.clip(hull, float(size[1]), float(size[0]))
    return boxes.xyxy_to_xywh(inside), boxes.area(inside) / boxes.area(hull).clamp(min=torch.finfo(hull.dtype).tiny)


def move_masks(
    masks: Bool[Tensor, "n height width"],
    crop: Crop,
    flip: bool,
    size: tuple[int, int],
    steps: Sequence[Float[np.ndarray, "2 3"]],
) -> Bool[Tensor, "n new_height new_width"]:
    """Masks after cropping, mirroring, resizing to ``size`` (height, width) and affine maps, to the nearest pixel.

    One map after the other, as with the image: what leaves the frame does not come back.
    """
    seen = torch.zeros(len(masks), *size, dtype=torch.bool)
    for i, mask in enumerate(masks.numpy()):
        picture = Image.fromarray(mask).crop(crop)
        if flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        picture = picture.resize((size[1], size[0]), Image.Resampling.NEAREST)
        for step in steps:
            picture = pixels.warp(picture, step, Image.Resampling.NEAREST, 0)
        seen[i] = torch.from_numpy(np.array(picture))
    return seen


def targets(boxes_xywh: Float[Tensor, "n 4"], size: tuple[int, int]) -> Float[Tensor, "n 4"]:
    """Boxes as a model is to predict them: ``cxcywh`` in shares of an image of ``size`` (height, width), float32."""
    x, y, w, h = boxes_xywh.unbind(1)
    height, width = size
    return torch.stack([(x + w / 2) / width, (y + h / 2) / height, w / width, h / height], 1).float()


# Words.

_LETTER = r"[^\W\d_]"  # so that right_of and left2 are sides, and bright is none
SIDES = re.compile(
    rf"(?<!{_LETTER})(top|bottom|upper|lower|far|mid|middle|center|centre|front|back|rear)?(left|right)"
    rf"(most|handed|hand|sides?|wards?|est|ish)?(?!{_LETTER})",
    re.IGNORECASE,
)

# "right behind him" says how near and "has left a trail" what was done, but "on the right behind him" is a side.
_A_SIDE_AFTER = "the his her its their my your our on to from and or far top bottom upper lower turn turning facing"
_RIGHT_BEFORE = (
    "now|away|here|there|next|behind|beside|above|over|below|beneath|under|underneath|along|alongside|against|across|past|"
    "through|into|outside|before|after|at|towards?|up|down|in front|in the (?:middle|center|centre)|on top|side up|"
    "of way|angles?"
)
_LEFT_BEFORE = "behind|over|alone|open|unattended"
_NO_SIDES = re.compile(
    "("
    + "".join(rf"(?<!\b{word} )" for word in _A_SIDE_AFTER.split())
    + rf"\b(?:right (?:{_RIGHT_BEFORE})|left (?:{_LEFT_BEFORE})|all right|be(?:en|ing) left(?! of)"
    + r"|(?:has|have|had|having) left (?:an?|the|his|her|its|their|some|behind))\b)",
    re.IGNORECASE,
)


def swap_sides(text: str) -> str:
    """The text about the mirrored image: left for right, leftmost for rightmost; "bright" and "right now" are none."""

    def other(match: re.Match) -> str:
        where, side, rest = match.groups(default="")
        swapped = "right" if side.lower() == "left" else "left"
        cased = swapped.upper() if side.isupper() else swapped.capitalize() if side[0].isupper() else swapped
        return where + cased + rest

    parts = _NO_SIDES.split(text)  # every second one is none
    return "".join(part if i % 2 else SIDES.sub(other, part) for i, part in enumerate(parts))


def _compose(before: Float[np.ndarray, "2 3"], after: Float[np.ndarray, "2 3"]) -> Float[np.ndarray, "2 3"]:
    return after @ np.vstack([before, [0, 0, 1]])
