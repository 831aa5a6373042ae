"""The pixels of :mod:`xvlm.data.pixels` in less time: vector code resizes, moves and sharpens, to within a bit or two,
and JPEGs are decoded no larger than needed, where edges differ by more (docs/data.md has figures).

Images are tensors of bytes here.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from xvlm.data import pixels
from xvlm.data.images import decode_small, is_undecoded_jpeg
from xvlm.data.randaugment import FACTOR, GREY, MOVING, Operation, affine_of

Picture = UInt8[Tensor, "3 height width"]
Crop = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def shrink(image: Image.Image, crop: Crop, size: tuple[int, int]) -> tuple[Crop, int]:
    """At which scale to decode a JPEG so that its crop is still as large as ``size`` (height, width).

    Returns:
        The crop, widened to whole pixels of the smaller image, which may reach over its edge by a part of one; and how
        many pixels one of those stands for: 8, 4, 2 or, for all other images, 1.
    """
    left, top, right, bottom = crop
    for scale in (8, 4, 2):
        if right - left >= scale * size[1] and bottom - top >= scale * size[0] and is_undecoded_jpeg(image):
            ends = (math.ceil(right / scale) * scale, math.ceil(bottom / scale) * scale)
            return (left // scale * scale, top // scale * scale, *ends), scale
    return crop, 1


def render(
    image: Image.Image,
    crop: Crop,
    scale: int,
    flip: bool,
    size: tuple[int, int],
    operations: Sequence[Operation],
    interpolation: Image.Resampling,
) -> Picture:
    """What :func:`xvlm.data.pixels.render` gives, of an image that need not be decoded yet.

    Args:
        crop, scale: what :func:`shrink` gives.

    Raises:
        Undecodable: (a ValueError) see :func:`xvlm.data.images.rgb`.
    """
    left, top, right, bottom = (edge // scale for edge in crop)
    part = decode_small(image, scale)[top:bottom, left:right]
    picture = resize(_tensor(part.copy()), size, interpolation)  # whole rows are faster to read
    if flip:
        picture = picture.flip(-1)
    for operation in operations:
        if operation.moves:
            picture = move(picture, operation)
        elif operation.name == "sharpness":
            picture = sharpen(picture)
        elif operation.name != "identity":
            picture = _tensor(np.array(pixels.recolour(_image(picture), operation.name)))
    return picture


def resize(
    picture: Picture, size: tuple[int, int], interpolation: Image.Resampling
) -> UInt8[Tensor, "3 new_height new_width"]:
    """An image at ``size`` (height, width), as Pillow has it but for the last bit or two."""
    if interpolation == Image.Resampling.LANCZOS:  # torch has none
        return _tensor(np.array(_image(picture).resize((size[1], size[0]), interpolation)))
    return F.interpolate(picture[None], size, mode=interpolation.name.lower(), antialias=True)[0]


def move(picture: Picture, movement: Operation) -> Picture:
    """What :func:`xvlm.data.pixels.warp` makes of it, but grey is mixed in at the border, as in the reference."""
    _, height, width = picture.shape
    grey = GREY[0]
    if movement.name.startswith("translate"):  # by whole pixels
        x, y = affine_of(movement, (width, height))[:, 2].astype(int).tolist()
        return F.pad(picture, (x, -x, y, -y), value=grey)  # less than nothing is a crop
    moved = F.grid_sample(picture[None].float().sub_(grey), _grid(movement, (width, height)), align_corners=False)
    return moved[0].add_(grey + 0.5).byte()


@lru_cache(maxsize=2 * len(MOVING))
def _grid(movement: Operation, size: tuple[int, int]) -> Float[Tensor, "1 height width 2"]:
    """Where the pixels of a moved image of ``size`` (width, height) come from, in [-1, 1]."""
    width, height = size
    to_pixels = np.array([[width / 2, 0, width / 2], [0, height / 2, height / 2], [0, 0, 1]])
    forward = np.vstack([affine_of(movement, size), [0, 0, 1]])
    back = np.linalg.inv(forward @ to_pixels) @ to_pixels
    return F.affine_grid(torch.from_numpy(back[None, :2]).float(), [1, 3, height, width], align_corners=False)


def sharpen(picture: Picture) -> Picture:
    """What :func:`xvlm.data.pixels.recolour` makes of it by ``sharpness``, to within a bit."""
    sharp, wide = picture.clone(), picture.short()
    rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inner = wide[:, 1:-1, 1:-1]
    edges = (9 * inner - around) * ((FACTOR - 1) / 13)  # the smooth image weighs the middle pixel by 5 of 13
    sharp[:, 1:-1, 1:-1] = edges.add_(inner).clamp_(0, 255)
    return sharp


def _tensor(pixels_last: UInt8[np.ndarray, "height width 3"]) -> Picture:
    return rearrange(torch.from_numpy(pixels_last), "height width channel -> channel height width")


def _image(picture: Picture) -> Image.Image:
    return Image.merge("RGB", [Image.fromarray(channel.numpy()) for channel in picture])
