"""A generated world: images of coloured shapes with exact English about them, for training and testing without data.

Everything follows from (seed, split, index): :func:`sample_scene` lays a scene out in relative coordinates,
:func:`render` draws it at any size, :func:`record` adds the language, :func:`samples` yields records with JPEG bytes.
A tenth of the (shape, colour) combinations is held out: only test scenes of odd index show them.
"""

import colorsys
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from random import Random
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from pycocotools import mask as coco_mask
from pydantic import Field, model_validator

from xvlm.data.records import RLE, Box, Expression, Object, Question, Record, Region, Statement, Strict
from xvlm.data.scene_drawing import Background, Stroke, cover, draw_background, paint, tight_box, visible
from xvlm.data.scene_language import Speaker
from xvlm.data.scene_language import vocabulary as vocabulary
from xvlm.data.scene_words import COLOURS, HELD_OUT, SHAPES, SIZES, TEXTURES, Attributes, Layout, Thing

VERSION = 2  # of what is drawn and said; raised when the same configuration gives other scenes
Split = Literal["train", "val", "test"]
Range = tuple[float, float]

HUES = {
    "red": (358, 0.86, 0.86),
    "orange": (27, 0.95, 0.98),
    "yellow": (53, 0.88, 0.97),
    "green": (128, 0.75, 0.62),
    "cyan": (182, 0.70, 0.90),
    "blue": (224, 0.82, 0.86),
    "purple": (274, 0.72, 0.68),
    "pink": (328, 0.50, 0.98),
}
LIGHT_INK = ("red", "green", "blue", "purple")  # textures are white on these, near black on the lighter colours
UPRIGHT = ("square", "diamond", "cross", "heart")  # turning these far makes them another shape, or odd
LAYOUT_SIZE = 64  # pixels at which overlaps are measured while a scene is laid out


class SceneConfig(Strict):
    """What scenes look like. Diameters are fractions of the image side; ``size`` is the image side in pixels.

    ``clutter`` in [0, 1] scales the strokes and blotches of the background, which are never mentioned. ``max_overlap``
    is the largest share of any object that others may hide.
    """

    size: Annotated[int, Field(ge=32)] = 128
    seed: int = 0
    min_objects: Annotated[int, Field(ge=2, le=7)] = 2
    max_objects: Annotated[int, Field(ge=2, le=7)] = 5
    small: Range = (0.16, 0.20)
    medium: Range = (0.26, 0.32)
    large: Range = (0.40, 0.48)
    clutter: Annotated[float, Field(ge=0, le=1)] = 0.5
    max_overlap: Annotated[float, Field(ge=0, le=0.5)] = 0.3
    quality: Annotated[int, Field(ge=1, le=100)] = 92

    @model_validator(mode="after")
    def sizes_are_apart(self) -> "SceneConfig":
        ends = [*self.small, *self.medium, *self.large]
        apart = self.small[1] * 1.2 <= self.medium[0] and self.medium[1] * 1.2 <= self.large[0]
        if not (ends[0] > 0 and ends == sorted(ends) and ends[-1] <= 0.6 and apart):
            raise ValueError(
                f"small {self.small}, medium {self.medium}, large {self.large}: expected three (low, high) ranges of "
                "diameters in (0, 0.6], each at least 1.2 times the one before"
            )
        if self.min_objects > self.max_objects:
            raise ValueError(f"min_objects {self.min_objects} exceeds max_objects {self.max_objects}")
        return self


@dataclass(frozen=True)
class Scene:
    """Where everything is, independent of resolution."""

    config: SceneConfig
    split: Split
    index: int
    layout: Layout
    background: Background

    @property
    def unseen(self) -> bool:
        """Whether this is a scene of held-out combinations: an odd one of the test split."""
        return is_unseen(self.split, self.index)


@dataclass(frozen=True)
class Rendered:
    """A drawn scene: per object the mask of its visible pixels and the tight box around them, in pixels."""

    image: UInt8[np.ndarray, "size size 3"]
    masks: Bool[np.ndarray, "object size size"]
    boxes_xyxy: list[Box]


def is_unseen(split: Split, index: int) -> bool:
    return split == "test" and index % 2 == 1


# Layout


@lru_cache(maxsize=16)
def sample_scene(config: SceneConfig, split: Split, index: int) -> Scene:
    """The scene at ``index`` of a split: the same for the same arguments, on any machine.

    Raises:
        ValueError: the objects do not fit: too many or too large for ``max_overlap``.
    """
    random = Random(f"scene/{config.seed}/{split}/{index}")
    for _ in range(200):
        count = random.randint(config.min_objects, config.max_objects)
        every = sample_attributes(random, count, is_unseen(split, index))
        layout = place_things(config, random, every)
        if layout:
            return Scene(config, split, index, layout, sample_background(config, random))
    raise ValueError(f"no room for {config.min_objects} to {config.max_objects} objects with {config!r}")


def sample_attributes(random: Random, count: int, unseen: bool) -> list[Attributes]:
    """Attributes of the objects of a scene: no two alike, but many share a shape or colour, to be easily confused."""
    certain = random.randrange(count)
    chosen: list[Attributes] = []
    while len(chosen) < count:
        held_out = unseen and (len(chosen) == certain or random.random() < 0.5)
        pairs = [pair for pair in product(SHAPES, COLOURS) if (pair in HELD_OUT) == held_out]
        if chosen and random.random() < 0.5:
            like = random.choice(chosen)
            pairs = [pair for pair in pairs if pair[0] == like.shape or pair[1] == like.colour] or pairs
        shape, colour = random.choice(pairs)
        attributes = Attributes(random.choice(SIZES), colour, random.choice(("plain", *TEXTURES)), shape)
        if attributes not in chosen:
            chosen.append(attributes)
    return chosen


def place_things(config: SceneConfig, random: Random, every: list[Attributes]) -> Layout | None:
    """Puts objects at random, each in front of those before it; None when one finds no place."""
    things: list[Thing] = []
    whole: list[Bool[np.ndarray, "y x"]] = []
    for attributes in every:
        for _ in range(20):
            thing = sample_thing(config, random, attributes)
            masks = [*whole, cover(thing, LAYOUT_SIZE) >= 0.5]
            shown = visible(np.stack(masks))
            if all(
                part.sum() >= (1 - config.max_overlap) * mask.sum() for part, mask in zip(shown, masks, strict=True)
            ):
                things.append(thing)
                whole = masks
                break
        else:
            return None
    covers = {
        (front, back): float((whole[back] & shown[front]).sum() / whole[back].sum())
        for front in range(len(things))
        for back in range(front)
        if (whole[back] & whole[front]).any()
    }
    return Layout(tuple(things), covers)


def sample_thing(config: SceneConfig, random: Random, attributes: Attributes) -> Thing:
    radius = random.uniform(*getattr(config, attributes.size)) / 2
    tilt = math.radians(12) if attributes.shape in UPRIGHT else math.pi
    hue, saturation, value = HUES[attributes.colour]
    paint = colorsys.hsv_to_rgb(
        (hue + random.uniform(-4, 4)) / 360 % 1,
        min(1.0, saturation * random.uniform(0.9, 1.08)),
        min(1.0, value * random.uniform(0.9, 1.05)),
    )
    tone = random.uniform(0.9, 1.0) if attributes.colour in LIGHT_INK else random.uniform(0.05, 0.15)
    return Thing(
        attributes,
        x=random.uniform(radius + 0.01, 0.99 - radius),
        y=random.uniform(radius + 0.01, 0.99 - radius),
        radius=radius,
        angle=random.uniform(-tilt, tilt),
        grain=random.uniform(0, math.pi),
        paint=paint,
        ink=(tone, tone, tone),
    )


def sample_background(config: SceneConfig, random: Random) -> Background:
    """Greyish tones, neither as dark nor as light as the second colours of textures."""
    base, hue = random.uniform(0.32, 0.75), random.random()
    corners = []
    for _ in range(4):
        value = min(0.82, max(0.25, base + 0.2 * config.clutter * random.uniform(-1, 1)))
        corners.append(colorsys.hsv_to_rgb(hue, random.uniform(0, 0.12), value))
    strokes = []
    for _ in range(round(24 * config.clutter * random.random())):
        x, y, turn = random.random(), random.random(), random.uniform(0, math.tau)
        length = random.choice((0.0, 0.04, 0.15)) * random.random()
        end = (x + length * math.cos(turn), y + length * math.sin(turn))
        tone = random.choice((-1, 1)) * random.uniform(0.04, 0.13)
        strokes.append(Stroke(x, y, *end, width=random.uniform(0.005, 0.014), tone=tone))
    noise = 0.1 * config.clutter * random.random()
    return Background(tuple(corners), tuple(strokes), noise, noise_seed=random.getrandbits(32))


# Pictures


def draw(scene: Scene, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The picture of a scene, ``size`` pixels square, RGB."""
    image = draw_background(scene.background, size)
    for thing in scene.layout.things:
        paint(image, thing)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def object_masks(scene: Scene, size: int) -> Bool[np.ndarray, "object size size"]:
    """The visible pixels of each object: covered by half at least, and not by half by one in front."""
    return visible(np.stack([cover(thing, size) >= 0.5 for thing in scene.layout.things]))


def render(scene: Scene, size: int) -> Rendered:
    """Picture, masks and boxes at ``size`` pixels (32 or more, so that no object vanishes)."""
    masks = object_masks(scene, size)
    return Rendered(draw(scene, size), masks, [tight_box(mask) for mask in masks])


# Records


def record_id(split: Split, index: int) -> str:
    return f"{split}-{index:06d}"


def speaker(scene: Scene) -> Speaker:
    """Says the same things about a scene each time it is made."""
    seed = f"language/{scene.config.seed}/{scene.split}/{scene.index}"
    return Speaker(scene.layout, Random(seed), unseen=scene.unseen)


def novelty(held_out: bool) -> str:
    return "unseen" if held_out else "seen"


def run_lengths(mask: Bool[np.ndarray, "y x"]) -> RLE:
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return RLE(size=tuple(encoded["size"]), counts=encoded["counts"].decode("ascii"))


def union(boxes_xyxy: list[Box]) -> Box:
    left, top, right, bottom = zip(*boxes_xyxy, strict=True)
    return min(left), min(top), max(right), max(bottom)


def record(scene: Scene, size: int | None = None) -> Record:
    """Everything said about a scene drawn at ``size`` pixels (default: the configured size), without the picture.

    Statements compare it with the record of ``index ^ 1`` in the same split, the other of its pair.
    """
    size = size or scene.config.size
    return annotate(scene, size, object_masks(scene, size))


def annotate(scene: Scene, size: int, masks: Bool[np.ndarray, "object y x"]) -> Record:
    say = speaker(scene)
    boxes = [tight_box(mask) for mask in masks]
    regions = [Region(box_xyxy=box, descriptions=say.descriptions(i)) for i, box in enumerate(boxes)]
    if group := say.group():
        regions.append(Region(box_xyxy=union([boxes[i] for i in group[1]]), descriptions=[group[0]]))
    other = sample_scene(scene.config, scene.split, scene.index ^ 1)
    other_id = record_id(scene.split, other.index)
    return Record(
        id=record_id(scene.split, scene.index),
        source="scenes",
        split=scene.split,
        width=size,
        height=size,
        captions=say.captions(),
        regions=regions,
        objects=[describe_object(thing, box) for thing, box in zip(scene.layout.things, boxes, strict=True)],
        expressions=expressions(scene, say, boxes, masks),
        questions=[Question(text=text, answers={answer: 1.0}, kind=kind) for text, answer, kind in say.questions()],
        statements=[
            Statement(text=text, other=other_id, label=label) for text, label in say.statements(speaker(other))
        ],
        licence="CC0-1.0",
        tags=[novelty(scene.unseen)],
    )


def describe_object(thing: Thing, box_xyxy: Box) -> Object:
    size, colour, texture, shape = thing.attributes
    adjectives = [size, colour] if texture == "plain" else [size, colour, texture]
    return Object(box_xyxy=box_xyxy, label=shape, attributes=adjectives)


def expressions(
    scene: Scene, say: Speaker, boxes_xyxy: list[Box], masks: Bool[np.ndarray, "object y x"]
) -> list[Expression]:
    """References with their targets, then phrases for what is absent."""
    encoded: dict[int, RLE] = {}
    out = []
    for index, reference in say.expressions():
        own = scene.layout.things[index].attributes
        encoded[index] = encoded.get(index) or run_lengths(masks[index])
        tags = [reference.kind, novelty(own.held_out), own.size]
        out.append(Expression(text=reference.text, box_xyxy=boxes_xyxy[index], mask=encoded[index], tags=tags))
    absent = [Expression(text=text, tags=["absent", novelty(said.held_out)]) for text, said in say.absent_expressions()]
    return out + absent


def encode_jpeg(image: UInt8[np.ndarray, "y x 3"], quality: int) -> bytes:
    """JPEG bytes without chroma subsampling, which would bleed the colours of small objects."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=quality, subsampling=0)
    return out.getvalue()


def samples(config: SceneConfig, split: Split, count: int, start: int = 0) -> Iterator[tuple[Record, bytes]]:
    """Records and JPEG bytes of the scenes ``start`` to ``start + count`` of a split.

    Let ``start`` and ``count`` be even, so that statements refer to records among them.
    """
    for index in range(start, start + count):
        scene = sample_scene(config, split, index)
        rendered = render(scene, config.size)
        yield annotate(scene, config.size, rendered.masks), encode_jpeg(rendered.image, config.quality)
