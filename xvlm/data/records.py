"""The one annotation schema: an image and everything that is said about it.

Every reader produces :class:`Record` and every shard holds it, so a caption set, a detection set and a set of referring
expressions differ only in which lists are filled. Boxes are ``xyxy`` in pixels of the stored image, floats, exclusive
right and bottom.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Box = tuple[float, float, float, float]
Text = Annotated[str, Field(min_length=1)]

_UNCHECKED = ContextVar("unchecked", default=False)


@contextmanager
def unchecked() -> Iterator[None]:
    """Records made inside may have boxes and spans anywhere, for a check that lists what is wrong with all of them."""
    before = _UNCHECKED.set(True)
    try:
        yield
    finally:
        _UNCHECKED.reset(before)


def is_unchecked() -> bool:
    """Whether this is inside :func:`unchecked`, where a reader should leave boxes as its file has them."""
    return _UNCHECKED.get()


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RLE(Strict):
    """A binary mask in COCO's compressed run-length encoding."""

    size: tuple[int, int]
    """Height, width."""
    counts: str


def is_mask(size: tuple[int, int], counts: str | list[int]) -> bool:
    """Whether run lengths, as numbers or as COCO's text, are those of all pixels; decoders take that for granted.

    Args:
        size: height, width.
    """
    lengths = _run_lengths(counts) if isinstance(counts, str) else counts
    return sum(lengths) == size[0] * size[1] and all(length >= 0 for length in lengths)


def _run_lengths(counts: str) -> list[int]:
    """Numbers out of COCO's text (cocoapi, rleFrString); none where it is no such text.

    A character has five bits of a number, the lowest first, and whether more follow. From the fourth on a number is the
    difference to the last but one.
    """
    lengths: list[int] = []
    length = shift = 0
    for code in counts.encode():
        bits = code - 48
        if not 0 <= bits < 64 or shift > 30:
            return []
        length |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            length -= (bits & 16) << shift - 4  # the sign of its last five bits
            lengths.append(length + (lengths[-2] if len(lengths) > 2 else 0))
            length = shift = 0
    return lengths


class Region(Strict):
    """A box with free descriptions ("the man left of the dog"); all describe the same box."""

    box_xyxy: Box
    descriptions: Annotated[list[Text], Field(min_length=1)]
    attributes: list[Text] = Field(default_factory=list)
    mask: RLE | None = None


class Object(Strict):
    """A box with a class label ("dog") and adjectives that may be put before it ("brown")."""

    box_xyxy: Box
    label: Text
    attributes: list[Text] = Field(default_factory=list)
    mask: RLE | None = None


class Phrase(Strict):
    """A span of one caption and the boxes it names (Flickr30k Entities)."""

    caption: int
    """Which of the record's captions, from 0."""
    start: int
    """First character of the span."""
    end: int
    """Character after the span."""
    boxes_xyxy: list[Box] = Field(default_factory=list)
    """None: named but not drawn."""


class Expression(Strict):
    """A referring expression; without a box it names something that is not in the image."""

    text: Text
    box_xyxy: Box | None = None
    """What it names; the box around all of ``boxes_xyxy`` where it names several things."""
    boxes_xyxy: list[Box] = Field(default_factory=list)
    """Each thing by itself, where it names several ("the two men on the left")."""
    mask: RLE | None = None
    tags: list[str] = Field(default_factory=list)
    """Slices of a report it belongs to."""
    id: str = ""
    """As its source numbers it."""


class Question(Strict):
    """A question and its answers with weights."""

    text: Text
    answers: dict[str, float] = Field(default_factory=dict)
    """Answer to weight, the share of annotators who gave it (VQA v2); none: to be predicted."""
    kind: str = ""
    id: str = ""
    """As its source numbers it; prediction files ask for it."""


class Statement(Strict):
    """A sentence about two images, true or false (NLVR2); this image is the left one."""

    text: Text
    other: str
    """Id of the record with the right image."""
    label: bool
    id: str = ""
    """As its source numbers it."""


class Record(Strict):
    """One image and its annotations."""

    id: Text
    """Unique within a source, usable as a file name."""
    source: Text
    """The data set."""
    split: Literal["train", "val", "test"] = "train"
    width: Annotated[int, Field(gt=0)]
    """Of the stored image, in pixels."""
    height: Annotated[int, Field(gt=0)]
    """Of the stored image, in pixels."""
    captions: list[Text] = Field(default_factory=list)
    """About the whole image."""
    regions: list[Region] = Field(default_factory=list)
    objects: list[Object] = Field(default_factory=list)
    phrases: list[Phrase] = Field(default_factory=list)
    expressions: list[Expression] = Field(default_factory=list)
    questions: list[Question] = Field(default_factory=list)
    statements: list[Statement] = Field(default_factory=list)
    licence: str = ""
    credit: str = ""
    """Who is to be named with the image, or where it is from."""
    tags: list[str] = Field(default_factory=list)
    """Slices of a report it belongs to."""
    original_id: str = ""
    """As the source writes it, where that is no ``id`` (a path)."""
    same_as: dict[str, str] = Field(default_factory=dict)
    """Other collections that hold this photograph, and its id there: ``coco``, ``flickr``."""

    @field_validator("id")
    @classmethod
    def id_is_a_file_name(cls, value: str) -> str:
        if "/" in value or "\\" in value or value.startswith("."):
            raise ValueError(f"id {value!r} must be usable as a file name: no slash, no leading dot")
        return value

    def boxes(self) -> Iterator[tuple[str, Box]]:
        """Every box, with its place in the record."""
        yield from ((f"regions.{i}", region.box_xyxy) for i, region in enumerate(self.regions))
        yield from ((f"objects.{i}", thing.box_xyxy) for i, thing in enumerate(self.objects))
        yield from ((f"expressions.{i}", one.box_xyxy) for i, one in enumerate(self.expressions) if one.box_xyxy)
        yield from ((f"expressions.{i}", box) for i, one in enumerate(self.expressions) for box in one.boxes_xyxy)
        yield from ((f"phrases.{i}", box) for i, phrase in enumerate(self.phrases) for box in phrase.boxes_xyxy)

    @model_validator(mode="after")
    def boxes_lie_in_the_image(self) -> "Record":
        if is_unchecked():
            return self
        for where, (left, top, right, bottom) in self.boxes():
            if not (0 <= left < right <= self.width and 0 <= top < bottom <= self.height):
                raise ValueError(
                    f"{where}: box ({left:g}, {top:g}, {right:g}, {bottom:g}) is not a box inside the "
                    f"{self.width}x{self.height} image (expected 0 <= left < right <= width, likewise top and bottom)"
                )
        for i, phrase in enumerate(self.phrases):
            if not (0 <= phrase.caption < len(self.captions)):
                raise ValueError(f"phrases.{i}: caption {phrase.caption} of {len(self.captions)}")
            if not (0 <= phrase.start < phrase.end <= len(self.captions[phrase.caption])):
                raise ValueError(f"phrases.{i}: span {phrase.start}:{phrase.end} is outside its caption")
        return self
