"""What can be wrong with one record and its image, and what may safely be done about it.

A record is looked at as the plain document it is in a file, before any validation, so that no problem hides another.
"""

import html
import math
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from PIL import Image
from pydantic import ValidationError

from xvlm.data.images import JPEG, PNG, Empty, Undecodable, decode_image, encode_like, open_image, orientation, plain
from xvlm.data.records import Record, is_mask, unchecked

KINDS = {
    "shard": "a shard that is missing, changed, or ends early",
    "reader": "an entry or a file that the reader cannot read",
    "record": "a field that is missing, unknown, or of the wrong type",
    "duplicate-id": "an id that another record has",
    "near-duplicate": "an image that looks like another one",
    "image-empty": "no bytes or no pixels",
    "image-unreadable": "no image, truncated, or of more than 100 megapixels",
    "image-size": "another size than the record says",
    "image-rotated": "an EXIF rotation, which boxes and training ignore",
    "image-mode": "CMYK, 16 bits, a palette, or transparency",
    "image-animated": "more than one frame",
    "image-format": "neither JPEG nor PNG nor WebP",
    "box-malformed": "not four finite numbers",
    "box-degenerate": "no width or no height",
    "box-outside": "sticks out of the image",
    "box-looks-xywh": "a width and height where right and bottom should be",
    "box-looks-xyxy": "right and bottom were taken for a width and height",
    "box-looks-relative": "between 0 and 1, where pixels should be",
    "mask-size": "a mask of another size than the image, or run lengths that do not fill it",
    "span-outside": "a phrase that is not in its caption",
    "other-missing": "a statement about another image that is not here",
    "answer-weight": "the weight of an answer is not a number above 0",
    "text-empty": "no words",
    "text-long": "more words than a model reads",
    "text-encoding": "wrongly decoded characters, HTML entities, control characters",
    "text-is-id": "an id, a number or a file name where words should be",
}

FORMATS = (*JPEG, "PNG", "WEBP")
MODES = ("RGB", "L")
TEXTS = ("captions", "descriptions", "attributes", "label", "text")
LOOK_XYWH = "these look like width and height, of which the columns are x,y,width,height (in JSON lines: box_xywh)"
SLIGHTLY = 0.02  # of the image's side: a box that sticks out by no more is cut off, one by more is not believed

_TURNED = {2: "mirrored", 3: "by 180", 4: "flipped", 5: "transposed", 6: "by 90", 7: "transverse", 8: "by 270"}
_ID = re.compile(
    r"\d{5,}|q\d{3,}|(n\d{8}|/[mg]/\w+)(\s.*)?|(?=\S*\d)[0-9a-f]{8,}(-[0-9a-f]{4,})*|\S+\.(jpe?g|png|webp|gif)"
    r"|(category|class|label|id|obj|object)[\s_:#-]*\d+|none|null|nan",
    re.IGNORECASE,
)
_ENTITY = re.compile(r"&(#\d+|#x[0-9a-f]+|[a-z]+\d*);", re.IGNORECASE)
_WORD = re.compile(r"[\u2e80-\u9fff]|[^\s\u2e80-\u9fff]{1,20}")  # a CJK character, or a word; long ones are several
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

Place = tuple[str | int, ...]  # of a value in a document: ("objects", 3, "label")
Fix = Literal["put", "drop", "leave out", "reencode", "turn"]


@dataclass(frozen=True)
class Item:
    """A record as it stands in a file, not validated, with its image; ``origins``: of what is elsewhere in a source."""

    where: str
    record: str
    document: dict[str, Any]
    image: bytes
    origins: dict[Place, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Args:
        kind: one of ``KINDS``.
        found: the value that is wrong.
        fix: what may safely be done: put ``better`` in its place; drop the element it belongs to; leave the record
            out; write the image anew as 8-bit RGB; or that, turned the right way up.
        where: the file, or the folder of a source.
    """

    kind: str
    place: Place
    message: str
    found: Any = None
    fix: Fix | None = None
    better: Any = None
    where: str = ""
    record: str = ""

    def __str__(self) -> str:
        place = ": ".join(filter(None, (self.where, self.record, ".".join(map(str, self.place)))))
        found = "" if self.found is None else f" (found {self.found!r:.120})"
        return f"{place}: {self.message}{found} [{self.kind}]"


def problems_of(item: Item, max_words: int, *, boxes_turned: bool = False) -> tuple[list[Problem], Image.Image | None]:
    """Everything that is wrong with a record, and its image where it can be decoded.

    Args:
        boxes_turned: boxes are of the picture as its EXIF turns it, even where the record's size is that of the stored
            pixels.
    """
    found, picture, size = _image(item.image, item.document, boxes_turned)
    stored = picture.size if boxes_turned and picture is not None else None
    for place, value in _values(item.document):
        name = next((part for part in reversed(place) if isinstance(part, str)), "")
        if _is_box(place, value):
            found += _box(place, value, size, stored)
        elif name in TEXTS and isinstance(value, str):
            found += _text(place, value, max_words, item.document)
        elif place[-2:-1] == ("answers",):
            found += _answer(place, value, max_words)
        elif name == "mask" and isinstance(value, dict) and "size" in value:
            found += _mask(place, value, size)
    found += _spans(item.document)
    found += _schema(item, {problem.place for problem in found})
    places = [item.origins.get(problem.place[:2], item.where) for problem in found]
    return [replace(one, where=where, record=item.record) for one, where in zip(found, places, strict=True)], picture


def boxes_of(document: dict[str, Any]) -> list[Any]:
    """All boxes of a document, whatever they are."""
    return [value for place, value in _values(document) if _is_box(place, value)]


def others_of(document: dict[str, Any]) -> list[tuple[int, str]]:
    """Of each statement about another image, its number and the id of that image."""
    statements = document.get("statements")
    said = enumerate(statements) if isinstance(statements, list) else ()
    return [(i, one["other"]) for i, one in said if isinstance(one, dict) and isinstance(one.get("other"), str)]


def _is_box(place: Place, value: Any) -> bool:
    return (place[-1:] == ("box_xyxy",) and value is not None) or place[-2:-1] == ("boxes_xyxy",)


def _values(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value in a document, at whatever depth, with its place."""
    yield place, value
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield from _values(each, (*place, key))


def _size(document: dict[str, Any]) -> tuple[int, int] | None:
    size = document.get("width"), document.get("height")
    return size if all(isinstance(side, int) and side > 0 for side in size) else None


# ---------------------------------------------------------------------------------------------------------------------
# Images


def _image(
    data: bytes, document: dict[str, Any], boxes_turned: bool
) -> tuple[list[Problem], Image.Image | None, tuple[int, int] | None]:
    """What is wrong with it, the image, and the size in whose pixels boxes are."""
    place, size = ("image",), _size(document)
    try:
        picture = decode_image(data, strict=True)
    except Undecodable as error:
        return [unreadable(error)], None, size
    found = []
    with open_image(data) as opened:
        turned = orientation(opened)
        turned_size = picture.size[::-1] if turned >= 5 else picture.size
        if boxes_turned and size == picture.size:
            size = turned_size
        if turned != 1:
            found.append(_rotated(document, turned, boxes_turned or size == turned_size != picture.size))
        if size not in (None, picture.size, turned_size):
            message = f"the record says {size[0]}x{size[1]}, the image is {picture.width}x{picture.height}"
            found.append(Problem("image-size", place, message))
        if opened.format not in FORMATS:
            found.append(Problem("image-format", place, "expected JPEG, PNG or WebP", opened.format, "reencode"))
        if opened.format != "MPO" and getattr(opened, "is_animated", False):
            message = "expected one frame; the first is used"
            found.append(Problem("image-animated", place, message, opened.n_frames, "reencode"))
        deep = data[:8] == PNG and data[24] == 16
        if opened.mode not in MODES or deep:
            mode = f"{opened.mode}, 16 bits" if deep else opened.mode
            # of numbers as wide as these, nobody knows which is white
            fix = "leave out" if opened.mode in ("I", "F") and not deep else "reencode"
            found.append(Problem("image-mode", place, "expected 8-bit RGB or grey", mode, fix))
    return found, picture, size


def unreadable(error: Undecodable, **more: str) -> Problem:
    """An image that cannot be decoded as a problem; ``more``: where, and of which record."""
    kind = "image-empty" if isinstance(error, Empty) else "image-unreadable"
    return Problem(kind, ("image",), str(error), fix="leave out", **more)


def _rotated(document: dict[str, Any], turned: int, boxes_turned: bool) -> Problem:
    how = f"EXIF turns the picture ({_TURNED[turned]})"
    if boxes_turned:
        message = f"{how}, and the record's size or boxes are of the turned picture, not of the stored pixels"
        return Problem("image-rotated", ("image",), message, turned, "turn")
    if boxes_of(document):
        message = (
            f"{how}; boxes have to be of the stored pixels: xvlm data show draws whether these are, and if they are of "
            "the turned picture, xvlm data check ... --boxes-turned --fix FOLDER turns it"
        )
        return Problem("image-rotated", ("image",), message, turned)
    return Problem("image-rotated", ("image",), f"{how}; training sees the stored pixels", turned, "turn")


# ---------------------------------------------------------------------------------------------------------------------
# Boxes, masks, spans


def _box(
    place: Place, box: Any, size: tuple[int, int] | None, stored: tuple[int, int] | None = None
) -> Iterator[Problem]:
    """What is wrong with a box in a picture of ``size``; ``stored``: in the file, where EXIF may turn it."""
    numbers = isinstance(box, (list, tuple)) and [
        edge for edge in box if isinstance(edge, (int, float)) and math.isfinite(edge)
    ]
    if not numbers or len(numbers) != 4 or len(box) != 4:
        yield Problem("box-malformed", place, "expected four finite numbers", box, "drop")
        return
    left, top, right, bottom = box
    if size is None:
        return
    width, height = size
    of = f"in the {width}x{height} image"
    if _inside(box, size):
        if right <= 1 and bottom <= 1 and max(size) > 8:
            yield Problem("box-looks-relative", place, f"expected pixels {of}, these look like shares of it", box)
        return
    degenerate = left >= right or top >= bottom
    out = max(-left / width, -top / height, right / width - 1, bottom / height - 1)  # by how much of the image
    if stored is not None and _inside(box, stored):
        message = f"expected a box {of} as EXIF turns it, this is one in the stored {stored[0]}x{stored[1]} pixels"
        yield Problem("box-outside", place, f"{message}; perhaps --boxes-turned is wrong here", box)
    elif looks_xywh(box, size):
        yield Problem("box-looks-xywh", place, f"expected right and bottom {of}, {LOOK_XYWH}", box)
    elif out > SLIGHTLY and not degenerate and _inside((left, top, right - left, bottom - top), size):
        message = f"sticks out {of}; it would not had right and bottom been read as such, not as width and height"
        yield Problem("box-looks-xyxy", place, message, box)
    elif degenerate:
        yield Problem("box-degenerate", place, "expected left < right and top < bottom", box, "drop")
    else:
        cut = [min(max(edge, 0), size[i % 2]) for i, edge in enumerate(box)]
        fix = "put" if out <= SLIGHTLY and _inside(cut, size) else "drop"
        yield Problem("box-outside", place, f"expected a box {of}", box, fix, cut if fix == "put" else None)


def looks_xywh(box: Any, size: tuple[int, int]) -> bool:
    """Whether a box that is none as ``xyxy`` is one inside the image (``size``: width, height) as ``xywh``."""
    left, top, right, bottom = box
    return (left > right or top > bottom) and _inside((left, top, left + right, top + bottom), size)


def _inside(box: Any, size: tuple[int, int]) -> bool:
    left, top, right, bottom = box
    return 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


def _mask(place: Place, mask: dict[str, Any], size: tuple[int, int] | None) -> Iterator[Problem]:
    if size is None:
        return
    counts = mask.get("counts")
    if mask["size"] != [size[1], size[0]]:
        message = f"expected height, width of the image, {size[1]}, {size[0]}"
        yield Problem("mask-size", (*place, "size"), message, mask["size"])
    elif isinstance(counts, str) and not is_mask(size, counts):
        message = f"expected run lengths of all {size[0] * size[1]} pixels"
        yield Problem("mask-size", (*place, "counts"), message, counts)


def _spans(document: dict[str, Any]) -> Iterator[Problem]:
    captions, phrases = document.get("captions", []), document.get("phrases", [])
    if not isinstance(captions, list) or not isinstance(phrases, list):  # the schema says so
        return
    for i, phrase in enumerate(phrases):
        try:
            caption, start, end = (phrase[key] for key in ("caption", "start", "end"))
            fits = 0 <= caption < len(captions) and 0 <= start < end <= len(captions[caption])
        except (KeyError, TypeError):  # likewise
            continue
        if not fits:
            message = f"expected a span of one of the {len(captions)} captions"
            yield Problem("span-outside", ("phrases", i), message, f"caption {caption}, {start}:{end}", "drop")


# ---------------------------------------------------------------------------------------------------------------------
# Texts and the rest


def _text(place: Place, text: str, max_words: int, document: dict[str, Any]) -> Iterator[Problem]:
    moves_spans = place[0] == "captions" and document.get("phrases")
    for problem in _wording(place, text, max_words):
        yield replace(problem, fix=None) if problem.kind == "text-encoding" and moves_spans else problem
    if _ID.fullmatch(text.strip()) or (place[-1] == "label" and text.strip().isdecimal()):
        yield Problem("text-is-id", place, "expected words", text)


def _answer(place: Place, weight: Any, max_words: int) -> Iterator[Problem]:
    """An answer is the name of its weight, so neither is put right alone; and "none" or a number may well be one."""
    for problem in _wording(place, str(place[-1]), max_words):
        yield replace(problem, fix=None)
    if isinstance(weight, (int, float)) and not 0 < weight < math.inf:  # the schema tells of what is no number
        yield Problem("answer-weight", place, "expected a number above 0", weight)


def _wording(place: Place, text: str, max_words: int) -> Iterator[Problem]:
    if not any(character.isalnum() for character in text):
        yield Problem("text-empty", place, "expected words", text, "drop")
        return
    better = decoded_again(text)
    if better != text or "\ufffd" in text:
        fix = "put" if "\ufffd" not in better else None
        yield Problem("text-encoding", place, f"meant {better!r}?", text, fix, better)
    if (words := len(_WORD.findall(text))) > max_words:
        yield Problem("text-long", place, f"{words} words, expected at most {max_words}", text)


def decoded_again(text: str) -> str:
    """A text without HTML entities, control characters, and UTF-8 that was read as Windows-1252 ("cafÃ©")."""
    text = re.sub(r"[^\x00-\x7f]{2,}", lambda run: _as_utf8(run.group()), text)
    text = html.unescape(text) if _ENTITY.search(text) else text
    return _CONTROL.sub("", text)


def _as_utf8(run: str) -> str:
    try:
        return b"".join(_byte(character) for character in run).decode("utf-8")
    except (UnicodeEncodeError, UnicodeDecodeError):  # it was read as what it is
        return run


def _byte(character: str) -> bytes:
    """Of Windows-1252; the five bytes it leaves open stand for themselves, as decoders have it."""
    return character.encode("latin-1" if "\x80" <= character <= "\x9f" else "cp1252")


def _schema(item: Item, known: set[Place]) -> Iterator[Problem]:
    """What a record's type has to say, but for what is known already."""
    if "." in item.record or item.document.get("id") != item.record:
        yield Problem("record", ("id",), f"expected an id without a dot, here {item.record!r}", item.document.get("id"))
    try:
        with unchecked():
            Record.model_validate(item.document)
    except ValidationError as error:
        for each in error.errors():
            place = each["loc"]
            if any(place[:n] in known for n in range(1, len(place) + 1)):
                continue
            if each["type"] == "too_short" and place[-1] == "descriptions":
                yield Problem("text-empty", place, "expected at least one description", fix="drop")
            else:
                found = None if each["type"] == "missing" else each["input"]
                yield Problem("record", place, each["msg"], found)


# ---------------------------------------------------------------------------------------------------------------------
# Putting right


def put_right(item: Item, problems: list[Problem]) -> tuple[Record, bytes]:
    """The record and its image with the safe fixes made.

    Raises:
        ValueError: it is still no valid record.
    """
    fixes = {problem.fix for problem in problems}
    document, image = deepcopy(item.document), item.image
    if fixes & {"reencode", "turn"}:
        picture = plain(image, turn="turn" in fixes)
        image, (document["width"], document["height"]) = encode_like(picture, image), picture.size
    for problem in problems:
        if problem.fix == "put":
            _parent(document, problem.place)[problem.place[-1]] = problem.better
    elements = {_element(problem.place) for problem in problems if problem.fix == "drop"}
    for element in sorted(elements, key=_order, reverse=True):  # from behind, so that numbers stay true
        _drop(document, element)
    if "regions" in document:
        document["regions"] = [region for region in document["regions"] if region["descriptions"]]
    return Record.model_validate(document), image


def _element(place: Place) -> Place:
    """The element of a list that goes when a value goes: an object with its box, a description alone."""
    return place if isinstance(place[-1], int) else place[:2]


def _order(place: Place) -> tuple[tuple[int, str], ...]:
    return tuple((part, "") if isinstance(part, int) else (0, part) for part in place)


def _parent(document: dict[str, Any], place: Place) -> Any:
    for part in place[:-1]:
        document = document[part]
    return document


def _drop(document: dict[str, Any], element: Place) -> None:
    del _parent(document, element)[element[-1]]
    if element[0] == "captions" and "phrases" in document:
        kept = [phrase for phrase in document["phrases"] if phrase["caption"] != element[1]]
        document["phrases"] = [
            phrase | {"caption": phrase["caption"] - (phrase["caption"] > element[1])} for phrase in kept
        ]
