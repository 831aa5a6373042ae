"""Reads your own JSON lines: a record per line, with the fields of :class:`xvlm.data.records.Record`.

::

    folder/{split}.jsonl
    folder/FILE                        as ``image`` says: from the folder, from images/ or {split}/ of it, or absolute

    {"image": "a.jpg", "captions": ["a dog on a sofa"],
     "objects": [{"box_xywh": [10, 20, 100, 80], "label": "dog", "attributes": ["brown"]}],
     "regions": [{"box_xyxy": [10, 20, 110, 100], "descriptions": ["a dog that sleeps"]}]}

Instead of ``image``, ``image_base64`` may have the file itself; then the line needs an ``id``. ``id``, ``source`` (else
the folder's name), ``split``, ``width`` and ``height`` may be left out. Boxes are in pixels of the stored image, and
named by their format: ``box_xyxy`` (left, top, right, bottom) or ``box_xywh`` (left, top, width, height). ``xvlm data
schema`` prints all fields.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Base64Bytes, BaseModel, ConfigDict

from xvlm.data.readers.entries import Four, entry, load_lines, part_of
from xvlm.data.readers.photographs import AllowMissing, Photographs, Sample, corners, identifier, known_as, record


class Thing(BaseModel):
    """A region, object or expression; the record checks its other fields."""

    model_config = ConfigDict(extra="allow")

    box_xyxy: Four | None = None
    box_xywh: Four | None = None

    def fields(self, where: str) -> dict[str, Any]:
        """Its fields with the box as ``box_xyxy``."""
        given = self.model_dump(exclude={"box_xywh"}, exclude_unset=True)
        if self.box_xywh is None:
            return given
        if "box_xyxy" in given:
            raise ValueError(f"{where}: a box as box_xyxy and as box_xywh; expected one of them")
        return given | {"box_xyxy": corners(self.box_xywh)}


class Line(BaseModel):
    """A line; the record checks its other fields."""

    model_config = ConfigDict(extra="allow")

    id: str = ""
    image: str = ""
    image_base64: Base64Bytes = b""
    width: int | None = None
    height: int | None = None
    regions: list[Thing] = []
    objects: list[Thing] = []
    expressions: list[Thing] = []


def read(
    folder: Path, split: str, *, file: Path | None = None, allow_missing: AllowMissing = False
) -> Iterator[Sample]:
    """Records and image bytes, as stored, in the order of the lines.

    Nothing is mended: a box that leaves the image is an error, as is a field that records do not have.

    Args:
        folder: see the module's docstring for the files in it.
        split: a name that begins with train, val, dev or test.
        file: of the annotations, where it has another name; None: the one of this split in the folder.
        allow_missing: leave images out that are listed but absent, and log how many; a list takes their names.

    Raises:
        FileNotFoundError: no lines, or an image is absent.
        ValueError: a line that is no record; names the file, the line, the field and what was found.
    """
    part = part_of(folder, split)
    path = file or folder / f"{split}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    source = folder.resolve().name
    with Photographs(folder, ".", "images", f"images/{split}", split, allow_missing=allow_missing) as images:
        for where, line in load_lines(Line, path):
            with entry():
                if bool(line.image) == bool(line.image_base64) or not (line.image or line.id):
                    raise ValueError(f"{where}: expected the path of an image in image, or image_base64 and an id")
                if line.image:
                    found = images.find(f"{where} lists it", line.image)
                else:
                    found = images.take(f"{where} has it", line.id, Path(where), line.image_base64)
                if found is None:
                    continue
                if line.width is not None and line.height is not None:
                    found = found.of_size(line.width, line.height)
                boxed = {
                    kind: [thing.fields(f"{where}: {kind}.{i}") for i, thing in enumerate(getattr(line, kind))]
                    for kind in ("regions", "objects", "expressions")
                }
                ours = {
                    "id": line.id or identifier(line.image),
                    "source": source,
                    "split": part,
                    "original_id": line.image,
                    "same_as": known_as(line.image),
                }
                made = record(where, found, **(ours | (line.model_extra or {}) | boxed))
                yield made, found.image
