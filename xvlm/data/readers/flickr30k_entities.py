"""Reads Flickr30k Entities: photographs with five captions whose phrases are tied to boxes.

Files as published (Plummer et al. 2015, https://github.com/BryanPlummer/flickr30k_entities)::

    folder/train.txt                  one photograph a line, without the extension
    folder/flickr30k-images/ID.jpg    or flickr30k_images/, images/; Flickr8k names them ID_HASH.jpg
    folder/annotations.zip            or unpacked:
    folder/Annotations/ID.xml         boxes of entity chains, in pixels of the original photograph
    folder/Sentences/ID.txt           captions: [/EN#283585/people A young child] is playing .

Boxes are ``xmin ymin xmax ymax`` in pixels counted from 1, the last ones inside.
"""

import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from xvlm.data.readers.entries import decoded, entry
from xvlm.data.readers.photographs import LARGEST, AllowMissing, Found, Photographs, Sample, around, record
from xvlm.data.records import Box, Phrase, Record, Region

SOURCE = "flickr30k_entities"
LICENCE = "Flickr terms: non-commercial research and education only"
PLACES = ("flickr30k-images", "flickr30k_images", "images")
NOT_VISUAL = "0"  # the one chain id that phrases of different things share

_SPAN = re.compile(r"\[/EN#(?P<chain>\d+)(?:/[^\s/\[\]]+)+ (?P<text>[^\[\]]+)\]")


def read(
    folder: Path, split: str, *, images_at: Sequence[Path] = (), allow_missing: AllowMissing = False
) -> Iterator[Sample]:
    """Records and image bytes, as stored, in the order of the list ``{split}.txt``.

    A record has the captions without markup, one phrase per marked span (no boxes: nothing was drawn for it) and one
    region per entity chain that has boxes: the box around all of them, described by the distinct phrases that name it.
    Boxes are scaled from the annotated photograph to the image at hand. The annotation counts pixels from 1 and means
    the last ones to be inside, so ``xmin - 1, ymin - 1, xmax, ymax`` are the edges; evaluations that take the numbers
    as they stand have boxes a pixel smaller at the left and the top.

    Args:
        folder: see the module's docstring for the files in it.
        split: train, val or test.
        images_at: folders that hold the photographs, instead of the usual places.
        allow_missing: leave photographs out that are listed but absent, and log how many; a list takes their names.

    Raises:
        FileNotFoundError: no list, no photographs, no annotations, or a listed one is absent.
        ValueError: a file that does not follow the format; names the file, and the line or object in it.
    """
    names = _listed(folder, split)
    with Photographs(folder, *PLACES, at=images_at, allow_missing=allow_missing) as images:
        annotations = _annotations(folder)
        for name in names:
            with entry():
                found = images.find(f"{split}.txt lists {name}", f"{name}.jpg")
                if found is not None:
                    yield _record(name, split, found, annotations), found.image


def _listed(folder: Path, split: str) -> list[str]:
    if split not in ("train", "val", "test"):
        raise ValueError(f"{folder}: split {split!r}; expected train, val or test")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    path = folder / f"{split}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such list of photographs")
    return decoded(str(path), path.read_bytes()).split()


def _annotations(folder: Path) -> Path | zipfile.Path:
    """What ``Annotations/`` and ``Sentences/`` are in; both kinds of path read alike."""
    if (folder / "Annotations").is_dir() and (folder / "Sentences").is_dir():
        return folder
    archive = folder / "annotations.zip"
    if not archive.exists():
        raise FileNotFoundError(f"{folder}: neither annotations.zip nor the folders Annotations and Sentences in it")
    try:
        return zipfile.Path(archive)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive}: not a zip archive: {error}") from None


def _text(annotations: Path | zipfile.Path, member: str) -> tuple[str, str]:
    """Where a file of annotations is, for messages, and what it says."""
    path = annotations / member
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file, but the photograph is listed")
    if isinstance(path, zipfile.Path) and (size := path.root.getinfo(path.at).file_size) > LARGEST:
        raise ValueError(f"{path}: {size} bytes once unpacked; expected the annotations of one photograph")
    try:
        return str(path), decoded(str(path), path.read_bytes())
    except (zipfile.BadZipFile, zlib.error, RuntimeError) as error:  # damaged, or encrypted
        raise ValueError(f"{path}: cannot be unpacked: {error}") from None


def _record(name: str, split: str, found: Found, annotations: Path | zipfile.Path) -> Record:
    number = name.partition("_")[0]
    boxes = _chains(*_text(annotations, f"Annotations/{number}.xml"), found)
    captions = _captions(*_text(annotations, f"Sentences/{number}.txt"))
    descriptions: dict[str, dict[str, str]] = {}  # chain -> lower case -> as first written
    phrases = []
    for i, caption in enumerate(captions):
        for start, end, chain in caption.spans:
            phrases.append(Phrase(caption=i, start=start, end=end, boxes_xyxy=boxes.get(chain, [])))
            text = caption.text[start:end]
            descriptions.setdefault(chain, {}).setdefault(text.lower(), text)
    regions = [
        Region(box_xyxy=around(boxes[chain]), descriptions=list(texts.values()))
        for chain, texts in descriptions.items()
        if boxes.get(chain) and chain != NOT_VISUAL
    ]
    return record(
        f"{annotations}: photograph {name}",
        found,
        id=name,
        source=SOURCE,
        split=split,
        captions=[caption.text for caption in captions],
        regions=regions,
        phrases=phrases,
        licence=LICENCE,
        credit=f"Flickr photograph {number}",
        same_as={"flickr": number},
    )


@dataclass
class _Caption:
    text: str
    spans: list[tuple[int, int, str]] = field(default_factory=list)  # start, end, chain


def _captions(where: str, text: str) -> list[_Caption]:
    captions = []
    for number, line in enumerate(text.split("\n"), 1):
        with entry():
            captions += [_caption(f"{where} line {number}", line)] if line.strip() else []
    if not captions:
        raise ValueError(f"{where}: no captions")
    return captions


def _caption(where: str, line: str) -> _Caption:
    caption, end = _Caption(""), 0
    line = line.strip()
    for span in _SPAN.finditer(line):
        caption.text += line[end : span.start()]
        start = len(caption.text)
        caption.text += span["text"]
        caption.spans.append((start, len(caption.text), span["chain"]))
        end = span.end()
    caption.text += line[end:]
    if "/EN#" in caption.text:
        raise ValueError(f"{where}: expected phrases marked as [/EN#ID/TYPE words], found {line!r}")
    return caption


def _chains(where: str, text: str, found: Found) -> dict[str, list[Box]]:
    """Boxes of each entity chain in pixels of the photograph at hand; one box may be of several chains.

    Chains that were not drawn (``nobndbox``, ``scene``) have no entry.
    """
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{where}: not readable as XML: {error}") from None
    annotated = _numbers(f"{where} size", root.find("size"), ("width", "height"))
    if min(annotated) <= 0:
        raise ValueError(f"{where} size: expected a width and height above 0, found {annotated}")
    scale = [actual / given for actual, given in zip((found.width, found.height), annotated, strict=True)]
    chains: dict[str, list[Box]] = {}
    for i, thing in enumerate(root.iter("object"), 1):
        with entry():
            names = [name.text or "" for name in thing.iter("name")]
            if not names:
                raise ValueError(f"{where} object {i}: no <name>; expected the id of its entity chain")
            for drawn in thing.iter("bndbox"):
                edges = ("xmin", "ymin", "xmax", "ymax")
                xmin, ymin, xmax, ymax = _numbers(f"{where} object {i} bndbox", drawn, edges)
                scaled = ((xmin - 1) * scale[0], (ymin - 1) * scale[1], xmax * scale[0], ymax * scale[1])
                box = found.inside(scaled)
                if box is not None:
                    for name in names:
                        chains.setdefault(name, []).append(box)
    return chains


def _numbers(where: str, parent: ElementTree.Element | None, tags: tuple[str, ...]) -> list[float]:
    numbers = []
    for tag in tags:
        found = parent.findtext(tag) if parent is not None else None
        if not re.fullmatch(r"\s*-?\d+(\.\d*)?\s*", found or ""):
            raise ValueError(f"{where}: expected a number in <{tag}>, found {found!r}")
        numbers.append(float(found))
    return numbers
