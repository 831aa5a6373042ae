"""How a scene becomes pixels: outlines as signed distances, textures, light, backgrounds.

Lengths are fractions of the image side until they are drawn, so a scene looks the same at any size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float

from xvlm.data.records import Box
from xvlm.data.scene_words import Thing

Grid = Float[np.ndarray, "#height #width"]  # a row and a column make a grid by broadcasting

TEXTURE_PERIOD = {"striped": 0.062, "dotted": 0.062, "checked": 0.09}  # fractions of the image side
NOISE_SIZE = 24


@dataclass(frozen=True)
class Stroke:
    """A faint line of the background from (x0, y0) to (x1, y1) in fractions of the image side; ``tone`` is added."""

    x0: float
    y0: float
    x1: float
    y1: float
    width: float
    tone: float


@dataclass(frozen=True)
class Background:
    """Colours (RGB in [0, 1]) of the corners top left, top right, bottom left, bottom right; strokes; blotches."""

    corners: tuple[tuple[float, float, float], ...]
    strokes: tuple[Stroke, ...]
    noise: float
    noise_seed: int


# Shapes: signed distance to the outline, negative inside, of a shape that fits the unit disc; x right, y down


def disc(x: Grid, y: Grid) -> Grid:
    return np.hypot(x, y) - 0.95


def square(x: Grid, y: Grid) -> Grid:
    return np.maximum(np.abs(x), np.abs(y)) - 0.8


def triangle(x: Grid, y: Grid) -> Grid:
    return np.maximum(0.866 * np.abs(x) - 0.5 * y, y) - 0.5


def ring(x: Grid, y: Grid) -> Grid:
    return np.abs(np.hypot(x, y) - 0.71) - 0.27


def cross(x: Grid, y: Grid) -> Grid:
    far, near = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.maximum(far - 0.93, near - 0.3)


def star(x: Grid, y: Grid) -> Grid:
    """Five points: the plane is folded onto one half of one point, whose edge is straight."""
    fold = np.abs(np.mod(np.arctan2(x, -y) + math.pi / 5, 0.4 * math.pi) - math.pi / 5)
    radius = np.hypot(x, y)
    edge_x, edge_y = 0.45 * math.cos(math.pi / 5) - 1, 0.45 * math.sin(math.pi / 5)
    return ((radius * np.cos(fold) - 1) * edge_y - radius * np.sin(fold) * edge_x) / math.hypot(edge_x, edge_y)


def diamond(x: Grid, y: Grid) -> Grid:
    return (np.abs(x) / 0.62 + np.abs(y) - 1) / math.hypot(1 / 0.62, 1)


def heart(x: Grid, y: Grid) -> Grid:
    """A quarter-turned square with a half disc on each upper side."""
    x, y = np.abs(x) * 0.64, 0.55 - y * 0.64
    lobe = np.hypot(x - 0.25, y - 0.75) - 0.3536
    near = 0.5 * np.maximum(x + y, 0)
    wedge = np.minimum(np.hypot(x, y - 1), np.hypot(x - near, y - near)) * np.sign(x - y)
    return np.where(x + y > 1, lobe, wedge) / 0.64


def crescent(x: Grid, y: Grid) -> Grid:
    return np.maximum(np.hypot(x, y) - 0.97, 0.8 - np.hypot(x - 0.52, y))


def arrow(x: Grid, y: Grid) -> Grid:
    shaft = np.maximum(np.abs(x + 0.44) - 0.5, np.abs(y) - 0.27)
    head = np.maximum(-x - 0.05, (0.85 * x + 1.02 * np.abs(y) - 0.83) / math.hypot(0.85, 1.02))
    return np.minimum(shaft, head)


OUTLINES: dict[str, Callable[[Grid, Grid], Grid]] = {
    "disc": disc,
    "square": square,
    "triangle": triangle,
    "ring": ring,
    "cross": cross,
    "star": star,
    "diamond": diamond,
    "heart": heart,
    "crescent": crescent,
    "arrow": arrow,
}


# Drawing


def coverage(distance: Grid) -> Grid:
    """The share of each pixel inside an outline, from the signed distance of its centre in pixels."""
    return np.clip(0.5 - distance, 0, 1)


def window(x: float, y: float, reach: float, size: int) -> tuple[slice, slice]:
    """Rows and columns of the pixels within ``reach`` of a point, all in fractions of the image side."""
    return tuple(slice(max(0, math.floor((c - reach) * size) - 1), math.ceil((c + reach) * size) + 1) for c in (y, x))


def offsets(x: float, y: float, rows: slice, columns: slice, size: int) -> tuple[Grid, Grid]:
    """Pixel centres of a window relative to a point, in fractions of the image side."""
    across = np.arange(size, dtype=np.float32)[None, columns] + np.float32(0.5)
    down = np.arange(size, dtype=np.float32)[rows, None] + np.float32(0.5)
    return across / np.float32(size) - np.float32(x), down / np.float32(size) - np.float32(y)


def turned(x: Grid, y: Grid, angle: float) -> tuple[Grid, Grid]:
    cos, sin = math.cos(angle), math.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def outline(thing: Thing, size: int) -> tuple[tuple[slice, slice], Grid, Grid, Grid]:
    """The window of a thing, its pixels' coordinates x and y from the centre, and signed distances in pixels."""
    rows, columns = window(thing.x, thing.y, thing.radius, size)
    x, y = offsets(thing.x, thing.y, rows, columns, size)
    u, v = turned(x / thing.radius, y / thing.radius, thing.angle)
    return (rows, columns), x, y, OUTLINES[thing.attributes.shape](u, v) * (thing.radius * size)


def cover(thing: Thing, size: int) -> Grid:
    """Share of each pixel of the whole image that the thing covers, whatever is in front of it."""
    where, _, _, distance = outline(thing, size)
    out = np.zeros((size, size), np.float32)
    out[where] = coverage(distance)
    return out


def visible(masks: Bool[np.ndarray, "object y x"]) -> Bool[np.ndarray, "object y x"]:
    """Removes from each mask what later ones, in front of it, hide."""
    later = np.logical_or.accumulate(masks[:0:-1], axis=0)[::-1]
    return np.concatenate([masks[:-1] & ~later, masks[-1:]])


def inked(thing: Thing, x: Grid, y: Grid, size: int) -> Grid | float:
    """Share of each pixel in the second colour of the thing's texture."""
    texture = thing.attributes.texture
    if texture == "plain":
        return 0.0
    period = TEXTURE_PERIOD[texture] * min(1.2, max(0.8, thing.radius / 0.12))
    u, v = (np.abs((c / period + 0.5) % 1 - 0.5) for c in turned(x, y, thing.grain))
    pixels = period * size
    if texture == "striped":
        return coverage((u - 0.22) * pixels)
    if texture == "dotted":
        return coverage((np.hypot(u, v) - 0.3) * pixels)
    across, down = coverage((u - 0.25) * pixels), coverage((v - 0.25) * pixels)
    return across + down - 2 * across * down


def paint(image: Float[np.ndarray, "size size 3"], thing: Thing) -> None:
    """Draws the thing over the image: texture, light from the top left, and a darker rim that sets equals apart."""
    size = image.shape[0]
    where, x, y, distance = outline(thing, size)
    ink = np.asarray(inked(thing, x, y, size))[..., None]
    colour = np.asarray(thing.paint, np.float32) * (1 - ink) + np.asarray(thing.ink, np.float32) * ink
    light = 1 - 0.1 * (x + y) / thing.radius
    rim = coverage(distance + 0.008 * size)
    colour = colour * (light * (0.6 + 0.4 * rim))[..., None]
    share = coverage(distance)[..., None]
    image[where] += share * (colour - image[where])


@lru_cache(maxsize=8)
def stretch(cells: int, size: int) -> Float[np.ndarray, "size cells"]:
    """Matrix that interpolates ``cells`` values linearly to ``size`` pixels."""
    at = np.clip((np.arange(size) + 0.5) / size * cells - 0.5, 0, cells - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(cells))).astype(np.float32)


def draw_background(background: Background, size: int) -> Float[np.ndarray, "size size 3"]:
    corners = np.asarray(background.corners, np.float32).reshape(2, 2, 3)
    ramp = stretch(2, size)
    image = np.einsum("ya,xb,abc->yxc", ramp, ramp, corners, optimize=True)
    noise = np.random.default_rng(background.noise_seed).uniform(-1, 1, (NOISE_SIZE, NOISE_SIZE)).astype(np.float32)
    ramp = stretch(NOISE_SIZE, size)
    image += np.float32(background.noise) * (ramp @ noise @ ramp.T)[..., None]
    for stroke in background.strokes:
        draw_stroke(image, stroke)
    return image


def draw_stroke(image: Float[np.ndarray, "size size 3"], stroke: Stroke) -> None:
    size = image.shape[0]
    dx, dy = stroke.x1 - stroke.x0, stroke.y1 - stroke.y0
    length = math.hypot(dx, dy)
    where = window(stroke.x0 + dx / 2, stroke.y0 + dy / 2, length / 2 + stroke.width, size)
    x, y = offsets(stroke.x0, stroke.y0, *where, size)
    along = np.clip((x * dx + y * dy) / max(length**2, 1e-9), 0, 1)
    distance = np.hypot(x - along * dx, y - along * dy) - stroke.width / 2
    image[where] += stroke.tone * coverage(distance * size)[..., None]


def tight_box(mask: Bool[np.ndarray, "y x"]) -> Box:
    """Left, top, right, bottom in pixels around the true pixels of a mask, of which there is at least one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
