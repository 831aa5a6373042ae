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
schema --lines`` prints all fields.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from xvlm.data.readers.entries import Four, decoded_64, entry, files_of, load_lines, part_of
from xvlm.data.readers.photographs import AllowMissing, Found, Photographs, Sample, corners, known_as, record, tidy
from xvlm.data.records import RLE, Record, is_mask


class Thing(BaseModel):
    """A region, object or expression; the record checks its other fields."""

    model_config = ConfigDict(extra="allow")

    box_xyxy: Four | None = None
    box_xywh: Four | None = None
    mask: RLE | None = None

    @field_validator("mask")
    @classmethod
    def mask_has_all_pixels(cls, mask: RLE | None) -> RLE | None:
        if mask is not None and not is_mask(mask.size, mask.counts):
            raise ValueError(f"expected run lengths of all pixels of {mask.size}, found counts {mask.counts!r:.80}")
        return mask

    def fields(self, where: str, found: Found) -> dict[str, Any]:
        """Its fields with the box as ``box_xyxy``."""
        given = self.model_dump(exclude={"box_xywh"}, exclude_unset=True)
        if self.box_xywh is not None:
            if "box_xyxy" in given:
                raise ValueError(f"{where}: a box as box_xyxy and as box_xywh; expected one of them")
            given["box_xyxy"] = corners(self.box_xywh)
        if given.get("box_xyxy"):
            found.check_pixels(where, given["box_xyxy"])
        return given


class Line(BaseModel):
    """A line; the record checks its other fields."""

    model_config = ConfigDict(extra="allow")

    id: str = ""
    image: str = ""
    image_base64: str = ""
    width: int | None = None
    height: int | None = None
    regions: list[Thing] = []
    objects: list[Thing] = []
    expressions: list[Thing] = []


def schema() -> dict[str, Any]:
    """The JSON schema of a line: a record's, with the image, either box, and what may be left out."""
    line = Record.model_json_schema()
    line |= {"title": "Line", "description": "One image and its annotations, as a line of a file."}
    line["properties"] |= Line.model_json_schema()["properties"] | {
        kind: line["properties"][kind] for kind in ("regions", "objects", "expressions")
    }
    line["required"] = []
    line["oneOf"] = [{"required": ["image"]}, {"required": ["image_base64", "id"]}]
    for thing in ("Region", "Object", "Expression"):
        one = line["$defs"][thing]
        meaning = {"title": "Box Xywh", "description": "Left, top, width, height, instead of box_xyxy."}
        one["properties"]["box_xywh"] = one["properties"]["box_xyxy"] | meaning
        if "box_xyxy" in one["required"]:
            one["required"].remove("box_xyxy")
            one["oneOf"] = [{"required": ["box_xyxy"]}, {"required": ["box_xywh"]}]
    return line


def read(
    folder: Path,
    split: str,
    *,
    files: Sequence[Path] = (),
    images_at: Sequence[Path] = (),
    allow_missing: AllowMissing = False,
) -> Iterator[Sample]:
    """Records and image bytes, as stored, in the order of the lines.

    Nothing is mended: a box that leaves the image is an error, as is a field that records do not have.

    Args:
        folder: see the module's docstring for the files in it.
        split: a name that begins with train, val, dev or test.
        files: of the annotations, where it is not the one of this split in the folder.
        images_at: folders that hold the photographs, instead of the usual places.
        allow_missing: leave images out that are listed but absent, and log how many; a list takes their names.

    Raises:
        FileNotFoundError: no lines, or an image is absent.
        ValueError: a line that is no record; names the file, the line, the field and what was found.
    """
    part = part_of(folder, split)
    paths = files_of(folder, files, f"{split}.jsonl")
    source = folder.resolve().name
    places = (".", "images", f"images/{split}", split)
    with Photographs(folder, *places, at=images_at, allow_missing=allow_missing) as images:
        for where, line in chain.from_iterable(load_lines(Line, path) for path in paths):
            with entry():
                if bool(line.image) == bool(line.image_base64) or not (line.image or line.id):
                    raise ValueError(f"{where}: expected the path of an image in image, or image_base64 and an id")
                if line.image:
                    found = images.find(f"{where} lists it", line.image)
                else:
                    image = decoded_64(f"{where}: image_base64", line.image_base64)
                    found = images.take(f"{where} has it", line.id, Path(where), image)
                if found is None:
                    continue
                if line.width is not None and line.height is not None:
                    found = found.of_size(line.width, line.height)
                boxed = {
                    kind: [thing.fields(f"{where}: {kind}.{i}", found) for i, thing in enumerate(getattr(line, kind))]
                    for kind in ("regions", "objects", "expressions")
                }
                ours = {
                    "id": line.id or images.id_of(tidy(line.image)),
                    "source": source,
                    "split": part,
                    "original_id": line.image,
                    "same_as": known_as(line.image),
                }
                made = record(where, found, **(ours | (line.model_extra or {}) | boxed))
                yield made, found.image
