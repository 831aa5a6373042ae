"""RandAugment (Cubuk et al. 2020) as X-VLM has it: two operations, each used half of the time, level 7 of 10.

Here they are drawn; :mod:`xvlm.data.pixels` and :mod:`xvlm.data.fast_pixels` carry them out.
"""

import math
from random import Random
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

FACTOR = 0.7 * 1.8 + 0.1  # of brightness and sharpness
COLOUR = ("identity", "autocontrast", "equalize", "brightness", "sharpness")
MOVING = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
GREY = (128, 128, 128)  # what comes from outside the image


class Operation(NamedTuple):
    """One of ``COLOUR`` or ``MOVING``."""

    name: str
    sign: int = 1  # of a movement: to which side

    @property
    def moves(self) -> bool:
        return self.name in MOVING


def draw(kind: Literal["none", "full", "colour"], rng: Random) -> list[Operation]:
    """Two operations of a kind, less those that are not used; ``colour`` has none that moves pixels."""
    if kind == "none":
        return []
    operations = []
    for name in rng.choices(COLOUR + MOVING if kind == "full" else COLOUR, k=2):
        if rng.random() < 0.5:
            operations.append(Operation(name, -1 if name in MOVING and rng.random() >= 0.5 else 1))
    return operations


def affine_of(movement: Operation, size: tuple[int, int]) -> Float[np.ndarray, "2 3"]:
    """A movement as a map of pixel coordinates of an image of ``size`` (width, height).

    The reference (OpenCV) counts from the middle of the first pixel, which is half a pixel from where ours do.
    """
    name, sign = movement
    shear, translate = sign * 0.3 * 0.7, sign * 10 * 0.7
    if name == "rotate":
        angle = math.radians(sign * 30 * 0.7)
        cos, sin = math.cos(angle), math.sin(angle)
        cx, cy = size[0] / 2, size[1] / 2
        affine = np.array([[cos, sin, cx - cos * cx - sin * cy], [-sin, cos, cy + sin * cx - cos * cy]])
    else:
        across = {"shear_x": (shear, 0.0), "translate_x": (0.0, translate)}.get(name, (0.0, 0.0))
        down = {"shear_y": (shear, 0.0), "translate_y": (0.0, translate)}.get(name, (0.0, 0.0))
        affine = np.array([[1.0, across[0], across[1]], [down[0], 1.0, down[1]]])
    affine[:, 2] += 0.5 - affine[:, :2].sum(1) / 2
    return affine
