"""Reads the lines that X-VLM is pre-trained on: images with captions, and regions.

JSON lines (the reference's dataset/pretrain_dataset.py), in one file or in parts::

    folder/{split}.jsonl               or {split}.json, or a folder {split}/ of such files, with any names
    folder/FILE                        where lines have paths: from the folder, from images/ of it, or absolute

A line has the image in ``binary`` (base64 of the file) or its path in ``image_rpath`` or ``image``; a ``caption`` (or
``desc``), a text or several; and ``elems``, each a ``caption``, a box ``bb`` and perhaps ``attributes``. Boxes are
``xywh`` in pixels. The folder's name becomes the records' source.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel

from xvlm.data.readers.entries import Four, decoded_64, entry, files_of, load_lines, numbered, only, part_of
from xvlm.data.readers.photographs import (
    AllowMissing,
    Photographs,
    Sample,
    corners,
    identifier,
    known_as,
    record,
)
from xvlm.data.records import Object, Region

Texts = str | list[str]


class Element(BaseModel):
    caption: Texts
    bb: Four
    attributes: Texts = []


class Line(BaseModel):
    caption: Texts = []
    desc: Texts = []
    elems: list[Element] = []
    binary: str = ""
    image_rpath: str = ""
    image: str = ""


def read(
    folder: Path,
    split: str,
    *,
    files: Sequence[Path] = (),
    images_at: Sequence[Path] = (),
    allow_missing: AllowMissing = False,
) -> Iterator[Sample]:
    """Records and image bytes, as stored: one per line, with the file's name and the line's number as id.

    An element with attributes and one caption becomes an object, any other a region. Boxes are cut off at the border of
    the image; elements without area in it are left out, and empty captions of the image.

    Args:
        folder: see the module's docstring for the files in it.
        split: a name that begins with train, val, dev or test.
        files: of the annotations, where it is not the one of this split in the folder.
        images_at: folders that hold the photographs, instead of the usual places.
        allow_missing: leave images out that are listed but absent, and log how many; a list takes their names.

    Raises:
        FileNotFoundError: no lines, or an image is absent.
        ValueError: a file that does not follow the format; names the file, the line and the field.
    """
    part = part_of(folder, split)
    source = folder.resolve().name
    with Photographs(folder, ".", "images", at=images_at, allow_missing=allow_missing) as images:
        for path in _files(folder, split, files):
            for number, (where, line) in enumerate(load_lines(Line, path), 1):
                with entry():
                    name = line.image_rpath or line.image
                    if line.binary:
                        found = images.take(
                            f"{where} has it", where, Path(where), decoded_64(f"{where}: binary", line.binary)
                        )
                    elif name:
                        found = images.find(f"{where} lists it", name)
                    else:
                        raise ValueError(
                            f"{where}: no image; expected it in binary, or its path in image_rpath or image"
                        )
                    if found is None:
                        continue
                    regions: list[Region] = []
                    objects: list[Object] = []
                    for element_at, element in numbered(f"{where}: elems.", line.elems):
                        with entry(element_at):
                            box = found.inside(corners(element.bb))
                            texts, attributes = _texts(element.caption), _texts(element.attributes)
                            if not texts:
                                raise ValueError(f"{element_at}: the caption of the box {element.bb} is empty")
                            if box is None:
                                continue
                            if attributes and len(texts) == 1:
                                objects.append(Object(box_xyxy=box, label=texts[0], attributes=attributes))
                            else:
                                regions.append(Region(box_xyxy=box, descriptions=texts, attributes=attributes))
                    made = record(
                        where,
                        found,
                        id=f"{identifier(path.stem)}_{number:08d}",
                        source=source,
                        split=part,
                        captions=_texts(line.caption) + _texts(line.desc),
                        regions=regions,
                        objects=objects,
                        original_id=name,
                        same_as=known_as(name),
                    )
                    yield made, found.image


def _files(folder: Path, split: str, files: Sequence[Path]) -> Sequence[Path]:
    names = (f"{split}.jsonl", f"{split}.json")
    parts = [path for path in sorted((folder / split).glob("[!._]*")) if path.is_file()]
    if parts and not files and only(folder, *names) is None:
        return parts
    return files_of(folder, files, *names, f"{split}/*")


def _texts(given: Texts) -> list[str]:
    """One text or several as those that are not empty."""
    texts = [given] if isinstance(given, str) else given
    return [text.strip() for text in texts if text.strip()]
