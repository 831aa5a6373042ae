"""What readers share beside files of annotations: photographs found, and what is said of them.

A reader is a module with ``read(folder, split, *, images_at=(), allow_missing=False) -> Iterator[Sample]``, named in
:class:`xvlm.data.pack.CorpusConfig`. One whose annotations may have any name takes ``files``, too. Its docstring shows
the files it expects and states their box format. It reads them with :mod:`xvlm.data.readers.entries`, so that a check
can go on behind what is wrong.
"""

import logging
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

from pydantic import ValidationError

from xvlm.data.images import Undecodable, open_image
from xvlm.data.readers.entries import NAMED, Origins, explained, keep_origins
from xvlm.data.records import Box, Record, is_unchecked

Sample = tuple[Record, bytes]
AllowMissing = bool | list[str]  # false: an absent photograph is an error; a list takes the names of the absent ones

MARGIN = 0.02  # of the image's side
SMALLEST = 8  # pixels of a side, of an image in which a box of one pixel is no mistake
CUT = "boxes cut off at the border of their image, by a pixel or more"
LEFT_OUT = "boxes left out, without area in their image"
LARGEST = 256 * 1024**2  # bytes of an image
SECONDS = 30.0  # that a server may be silent

logger = logging.getLogger(__name__)

_NO_FILE = re.compile(r'[\\:?*"<>|]')  # what URLs have, and names of files had better not have
_COCO_NAME = re.compile(r"COCO_(?:train|val|test)20\d\d_0*(\d+)(?:_\d+)?\.")
_FLICKR_URL = re.compile(r"static\.?flickr\.com/(?:.*/)?(\d+)_[0-9a-f]+")


# ---------------------------------------------------------------------------------------------------------------------
# Photographs


class Found(NamedTuple):
    """A photograph: what asks for it, where it is, its bytes as stored and its size in pixels.

    ``boxes`` counts those that are cut off or left out, of all photographs together.
    """

    listed: str
    path: Path | str
    image: bytes
    width: int
    height: int
    boxes: Counter[str]

    def of_size(self, width: int, height: int) -> "Found":
        """The photograph, of the size in whose pixels its boxes are. Raises ValueError unless that is the image's.

        For a check, one of another size, perhaps because EXIF turns it, has the size that is stated.
        """
        if (self.width, self.height) != (width, height):
            if is_unchecked():
                return self._replace(width=width, height=height)
            raise ValueError(
                f"{self.path}: the image is {self.width}x{self.height}, its boxes are in pixels of {width}x{height} "
                f"({self.listed})"
            )
        return self

    def inside(self, box_xyxy: Box) -> Box | None:
        """The part of a box in the image; None where there is none.

        For a check, a box that would lose a pixel or more, or has no area, stays as it is.
        """
        x0, y0, x1, y1 = box_xyxy
        left, right = (min(max(edge, 0.0), float(self.width)) for edge in (x0, x1))
        top, bottom = (min(max(edge, 0.0), float(self.height)) for edge in (y0, y1))
        part, has_area = (left, top, right, bottom), left < right and top < bottom
        if has_area and all(abs(a - b) < 1 for a, b in zip(part, box_xyxy, strict=True)):
            return part
        if is_unchecked():
            return box_xyxy
        self.boxes[CUT if has_area else LEFT_OUT] += 1
        return part if has_area else None

    def nearly_inside(self, where: str, box_xyxy: Box) -> Box:
        """As :meth:`inside`, of a box that may leave the image by no more than rounding and careless drawing explain.

        A box in another format than stated, or of an image of another size, tends to leave it by more.

        Raises:
            ValueError: no area in the image, out of it by more than ``MARGIN`` of its side, or as
                :meth:`check_pixels`; says where, and which box.
        """
        self.check_pixels(where, box_xyxy)
        left, top, right, bottom = box_xyxy
        box = self.inside(box_xyxy)
        if is_unchecked():
            return box
        out_x, out_y = max(-left, right - self.width), max(-top, bottom - self.height)
        if box is None or out_x > MARGIN * self.width or out_y > MARGIN * self.height:
            raise ValueError(
                f"{where}: box {_numbers(box_xyxy)} as left, top, right, bottom; expected one with an area, inside the "
                f"{self.width}x{self.height} image or out of it by {MARGIN:.0%} of its side at most"
            )
        return box

    def check_pixels(self, where: str, box_xyxy: Box) -> None:
        """Raises ValueError about a box in the image's first pixel: its numbers are shares of the size."""
        if not is_unchecked() and all(0 <= edge <= 1 for edge in box_xyxy) and max(self.width, self.height) > SMALLEST:
            raise ValueError(
                f"{where}: box {_numbers(box_xyxy)} as left, top, right, bottom; expected pixels of the "
                f"{self.width}x{self.height} image, these look like shares of it"
            )


def _numbers(box: Box) -> str:
    return f"({', '.join(f'{edge:g}' for edge in box)})"


class Photographs:
    """Image files of a data set, wherever its copies keep them.

    A context: leaving it logs how many were absent, and how many boxes were cut off or left out.

    Args:
        folder: of the data set.
        places: folders in it that may hold the photographs, in the order in which they are searched.
        at: the folders that hold them, where these are none of the places.

    Raises:
        FileNotFoundError: none of the places is there, or not all of ``at``; names them.
    """

    def __init__(self, folder: Path, *places: str, at: Sequence[Path] = (), allow_missing: AllowMissing = False):
        if absent := [place for place in at if not place.is_dir()]:
            raise FileNotFoundError(f"{absent[0]}: no such folder of photographs")
        self.places = list(at) or [folder / place for place in places if (folder / place).is_dir()]
        if not self.places:
            raise FileNotFoundError(f"{folder}: no photographs; expected in it a folder {', '.join(places)}")
        self.allow_missing = allow_missing
        self.absent: list[str] = []
        self.boxes: Counter[str] = Counter()
        self.names: dict[str, str] = {}  # of the image that has an id
        self.asked = 0

    def __enter__(self) -> "Photographs":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.absent:
            named = ", ".join(self.absent[:NAMED]) + (" …" if len(self.absent) > NAMED else "")
            logger.warning(
                "%s: %d of %d photographs are absent: %s", self.places[0], len(self.absent), self.asked, named
            )
        for what, count in self.boxes.items():
            logger.warning("%s: %s: %d (xvlm data check --reader lists them)", self.places[0], what, count)

    def find(self, listed: str, *names: str) -> Found | None:
        """The photograph that has one of these names, paths from one of the places; None: absent, which is allowed.

        A URL (``http``, ``https``) is fetched, each time it is asked for.

        Args:
            listed: what asks for it, for messages ("test.txt lists 777").

        Raises:
            FileNotFoundError: absent, which is not allowed; says what asks for it.
            Undecodable: (a ValueError) not an image; likewise.
        """
        if names[0].startswith(("http://", "https://")):
            return self.take(listed, names[0], names[0], _fetched(names[0]))
        path = self.locate(*names)
        if path is None:
            return self.take(listed, names[0], self.places[0] / names[0], None)
        if (size := path.stat().st_size) > LARGEST:  # asked first: reading would take the memory
            raise Undecodable(f"{path}: {size} bytes; expected an image of at most {LARGEST} ({listed})")
        return self.take(listed, names[0], path, path.read_bytes())

    def locate(self, *names: str) -> Path | None:
        """Where the photograph is that has one of these names; None: nowhere."""
        return next((path for place in self.places for name in names if _is_file(path := place / name)), None)

    def id_of(self, name: str) -> str:
        """The :func:`identifier` of an image. Raises ValueError where another image has the same; names both."""
        made = identifier(name)
        if (other := self.names.setdefault(made, name)) != name:
            raise ValueError(
                f"{self.places[0]}: {name}: its id would be {made!r}, as that of {other}; rename one of them"
            )
        return made

    def take(self, listed: str, name: str, path: Path | str, image: bytes | None) -> Found | None:
        """As :meth:`find`, of a photograph that is no file of its own; ``image`` is None where it is absent."""
        self.asked += 1
        if image is not None:
            try:
                return Found(listed, path, image, *open_image(image).size, self.boxes)
            except Undecodable as error:
                raise type(error)(f"{path}: {error} ({listed})") from None
        if self.allow_missing is False:
            raise FileNotFoundError(
                f"{path}: no such photograph, but {listed} (--allow-missing or corpus.allow_missing=true leaves it out)"
            )
        self.absent.append(name)
        if isinstance(self.allow_missing, list):
            self.allow_missing.append(name)
        return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def _fetched(url: str) -> bytes | None:
    """What a URL leads to; None where that is nothing."""
    try:
        with urlopen(url, timeout=SECONDS) as answer:
            image = answer.read(LARGEST + 1)
    except (OSError, HTTPException, ValueError):  # ValueError: a URL that is none
        return None
    if len(image) > LARGEST:
        raise ValueError(f"{url}: expected an image of at most {LARGEST} bytes")
    return image


# ---------------------------------------------------------------------------------------------------------------------
# What is said


def record(where: str, found: Found, origins: Origins | None = None, **said: Any) -> Record:
    """The record of a photograph. Raises ValueError that says where and which field is wrong.

    Args:
        origins: where values are that are elsewhere.
    """
    try:
        made = Record(width=found.width, height=found.height, **said)
    except ValidationError as error:
        raise explained(where, error) from None
    keep_origins(made.id, {(): where} | (origins or {}))
    return made


def identifier(name: str) -> str:
    """An id out of a path or URL and nothing else: ``val2014/a.jpg`` is ``val2014_a``, ``a.png`` is ``a_png``.

    That of a URL ends with a digest, as what is replaced in it may be all that tells it from another.
    """
    plain = re.sub(r"[/.]+", "_", _NO_FILE.sub("/", name.removesuffix(".jpg")).strip("/."))
    return f"{plain}_{sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}" if _NO_FILE.search(name) else plain


def tidy(name: str) -> str:
    """A path as the one of all that lead to the same image (``./a.jpg`` is ``a.jpg``); a URL as it is."""
    return name if "://" in name or not name else posixpath.normpath(name)


def known_as(*names: str) -> dict[str, str]:
    """``Record.same_as`` as far as file names and URLs tell it: COCO's names have COCO's id, Flickr's URLs Flickr's."""
    patterns = {"coco": _COCO_NAME, "flickr": _FLICKR_URL}
    searched = ((key, pattern.search(name)) for name in names for key, pattern in patterns.items())
    return {key: match[1] for key, match in searched if match}


def corners(box_xywh: Box) -> Box:
    """``xywh`` (left, top, width, height) as ``xyxy``."""
    x, y, w, h = box_xywh
    return (x, y, x + w, y + h)


def around(boxes_xyxy: list[Box]) -> Box:
    """The smallest box around all of them."""
    lefts, tops, rights, bottoms = zip(*boxes_xyxy, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)
