"""The words and frames of sentences about scenes, where things lie, and when a word holds of them.

A predicate (:func:`matches`, :func:`relation_holds`, :func:`zone_holds`, :func:`is_extreme`) answers None where a
person might argue.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

SHAPES = ("disc", "square", "triangle", "ring", "cross", "star", "diamond", "heart", "crescent", "arrow")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
TEXTURES = ("plain", "striped", "dotted", "checked")
SIZES = ("small", "medium", "large")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
NUMBERS += ("thirteen", "fourteen", "fifteen")
NOUNS = ("object", "thing")
VALUES = {"size": SIZES, "colour": COLOURS, "texture": TEXTURES, "shape": SHAPES}

# One colour each, so that every colour keeps nine of ten shapes and every shape at least seven of eight colours.
HELD_OUT = frozenset(
    {
        ("disc", "purple"),
        ("square", "cyan"),
        ("triangle", "pink"),
        ("ring", "yellow"),
        ("cross", "orange"),
        ("star", "blue"),
        ("heart", "green"),
        ("arrow", "red"),
    }
)

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above", "front": "behind", "behind": "front"}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
RELATIONS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
    "front": ("in front of", "partly covering"),
    "behind": ("behind", "partly hidden by"),
}
ZONES = {
    "top left": ("at the top left", "in the top left"),
    "top right": ("at the top right", "in the top right"),
    "bottom left": ("at the bottom left", "in the bottom left"),
    "bottom right": ("at the bottom right", "in the bottom right"),
    "middle": ("in the middle", "in the centre"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
}
SUPERLATIVES = {
    "largest": ("largest", "biggest"),
    "smallest": ("smallest",),
    "left": ("leftmost",),
    "right": ("rightmost",),
    "top": ("topmost", "highest"),
    "bottom": ("bottommost", "lowest"),
}


FRAMES = {
    "complete": (
        "{things}",
        "there is {things}",
        "a picture of {things}",
        "an image with {things}",
        "this picture shows {things}",
        "we see {things}",
        "a scene with {things}",
        "here is {things}",
    ),
    "partial": ("{things}", "a picture with {things}", "one can see {things}", "the image contains {things}"),
    "counting": (
        "there are {total} objects, {count} of them {value}",
        "{total} objects, {count} of them {value}",
        "a picture of {total} things, {count} of which {be} {value}",
    ),
    "exactly": (
        "exactly {count} {things}",
        "there {be} {count} {things} in the picture",
        "an image with {count} {things}",
    ),
    "negation": (
        "a scene without any {absent}",
        "there is no {absent} here",
        "{present} but no {absent}",
        "an image without {a_absent}",
    ),
    "relation": ("{subject} is {relation} {anchor}", "a scene where {subject} is {relation} {anchor}"),
    "extreme": ("{subject} is {thing}", "in this picture {subject} is {thing}"),
    "group": ("the {count} {things}", "all {count} {things}"),
    "pair": ("the two {things}", "both {things}"),
    "adjectives": ("the {noun} that is {adjectives}",),
    "colour": ("what colour is {subject}", "which colour does {subject} have"),
    "shape": ("what shape is {subject}", "what kind of shape is {subject}"),
    "size": ("what size is {subject}", "how big is {subject}"),
    "texture": ("what pattern does {subject} have", "which pattern is on {subject}"),
    "where": ("where is {subject}", "where in the picture is {subject}"),
    "count": ("how many {things} are there", "how many {things} does the picture show"),
    "exists": ("is there {a_thing}", "does the picture show {a_thing}", "can you see {a_thing}"),
    "attribute": ("is {subject} {value}",),
    "related": ("is {subject} {relation} {anchor}",),
    "answers": ("yes", "no"),
    "joints": ("a", "an", "the", "it", "and"),
}

Judge = Callable[[int, int, int], bool]

# Sentences about two images; the judges are given the counts on the left and right and the number named, if any.
COMPARISONS: tuple[tuple[str, Judge], ...] = (
    ("the left image has more {things} than the right one", lambda left, right, number: left > right),
    ("there are fewer {things} in the left image than in the right one", lambda left, right, number: left < right),
    ("both images have the same number of {things}", lambda left, right, number: left == right),
    ("both images contain {a_thing}", lambda left, right, number: left > 0 and right > 0),
    ("neither image contains {a_thing}", lambda left, right, number: left == right == 0),
    ("only the left image contains {a_thing}", lambda left, right, number: left > 0 and right == 0),
    ("only the right image contains {a_thing}", lambda left, right, number: left == 0 and right > 0),
    ("the two images show {number} {things} in total", lambda left, right, number: left + right == number),
)


class Attributes(NamedTuple):
    """Attribute words of an object, or of a phrase about one, where "" is an attribute left unsaid."""

    size: str = ""
    colour: str = ""
    texture: str = ""
    shape: str = ""

    @property
    def held_out(self) -> bool:
        return (self.shape, self.colour) in HELD_OUT


@dataclass(frozen=True)
class Thing:
    """One object of a scene. Lengths are fractions of the image side, angles radians, colours RGB in [0, 1]."""

    attributes: Attributes
    x: float
    y: float
    radius: float
    angle: float
    grain: float  # direction of the texture
    paint: tuple[float, float, float]
    ink: tuple[float, float, float]  # second colour of the texture


@dataclass(frozen=True)
class Layout:
    """Objects back to front. ``covers`` has a (front, back) pair for each two whose outlines intersect.

    Its value is the share of the back one that is covered by visible parts of the front one.
    """

    things: tuple[Thing, ...]
    covers: dict[tuple[int, int], float]


def matches(said: Attributes, attributes: Attributes) -> bool:
    """Whether an object has every attribute said."""
    return all(not word or word == own for word, own in zip(said, attributes, strict=True))


def relation_holds(layout: Layout, relation: str, subject: int, anchor: int) -> bool | None:
    """Whether object ``subject`` is left, right, above, below, front or behind of object ``anchor``; None: arguable.

    A direction holds when the centres lie at least 0.12 of the image side apart along it and it is not a mere diagonal;
    front and behind hold when at least a twentieth of the farther object is visibly covered by the nearer one.
    """
    if relation in DIRECTIONS:
        dx = layout.things[subject].x - layout.things[anchor].x
        dy = layout.things[subject].y - layout.things[anchor].y
        right, down = DIRECTIONS[relation]
        along, across = dx * right + dy * down, abs(dx * down) + abs(dy * right)
        if along <= 0:
            return False
        return True if along >= 0.12 and along >= 0.7 * across else None
    pair = (subject, anchor) if relation == "front" else (anchor, subject)
    if pair not in layout.covers:
        return False
    return True if layout.covers[pair] >= 0.05 else None


def zone_holds(zone: str, thing: Thing) -> bool | None:
    """Whether the centre of ``thing`` lies in a zone of the image ("top left", "top", "middle"); None: arguable."""
    if zone == "middle":
        off = max(abs(thing.x - 0.5), abs(thing.y - 0.5))
        return True if off <= 0.1 else None if off < 0.2 else False
    distance = {"left": thing.x, "right": 1 - thing.x, "top": thing.y, "bottom": 1 - thing.y}
    farthest = max(distance[side] for side in zone.split())
    return True if farthest <= 0.36 else None if farthest < 0.5 else False


def is_extreme(superlative: str, thing: Thing, others: Iterable[Thing]) -> bool:
    """Whether ``thing`` is the largest, smallest, or farthest towards a side among others, by a clear margin."""
    if superlative == "largest":
        return all(thing.radius >= 1.2 * other.radius for other in others)
    if superlative == "smallest":
        return all(thing.radius * 1.2 <= other.radius for other in others)
    right, down = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}[superlative]
    return all((thing.x - other.x) * right + (thing.y - other.y) * down >= 0.08 for other in others)


def place(thing: Thing) -> str | None:
    """The one zone that answers "where is it", None where two might be given."""
    for zone in ZONES:
        if zone_holds(zone, thing):
            across = abs(thing.y - 0.5) if zone in ("left", "right") else abs(thing.x - 0.5)
            return zone if " " in zone or zone == "middle" or across <= 0.1 else None
    return None


def number_word(count: int) -> str:
    return NUMBERS[count]


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def plural(word: str) -> str:
    return word + ("es" if word.endswith("s") else "s")


def enumeration(parts: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def parts_of(attributes: Attributes) -> list[Attributes]:
    """Every way to leave out some of the attributes but not all, fewest words first."""
    kept = sorted(itertools.product((False, True), repeat=4), key=sum)[1:]
    return [Attributes(*(word if keep else "" for word, keep in zip(attributes, row, strict=True))) for row in kept]
