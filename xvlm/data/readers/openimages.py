"""Reads Open Images: photographs with boxes of 600 classes.

Files as published (Kuznetsova et al. 2020, https://storage.googleapis.com/openimages/web), any version with boxes, or
as FiftyOne lays them out::

    folder/{split}-annotations-bbox.csv               or oidv6-{split}-annotations-bbox.csv; in annotations/ as well
    folder/class-descriptions-boxable.csv             or oidv7-class-descriptions-boxable.csv; likewise
    folder/{split}-images-boxable-with-rotation.csv   if at hand: licences and authors; likewise
    folder/{split}/ID.jpg                             or folder/images/{split}/, folder/images/

    folder/{split}/labels/detections.csv              FiftyOne's layout
    folder/{split}/metadata/classes.csv
    folder/{split}/data/ID.jpg

Boxes are ``XMin XMax YMin YMax``, shares of the image's width and height. Rows are read one after the other: those of a
photograph follow each other, as they do in the published files.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, FiniteFloat

from xvlm.data.readers.entries import Kind, checked, entry, load_cells, load_table, only, part_of
from xvlm.data.readers.photographs import AllowMissing, Found, Photographs, Sample, known_as, record
from xvlm.data.records import Object

SOURCE = "openimages"


class Row(BaseModel):
    ImageID: str
    LabelName: str
    XMin: FiniteFloat
    XMax: FiniteFloat
    YMin: FiniteFloat
    YMax: FiniteFloat
    IsGroupOf: bool | Literal["-1"] = False  # -1: not asked, as of the boxes that a machine drew
    Confidence: FiniteFloat = 1.0  # 0: people said it is not there


class Origin(BaseModel):
    ImageID: str
    OriginalURL: str = ""
    License: str = ""
    Author: str = ""


def read(
    folder: Path, split: str, *, images_at: Sequence[Path] = (), allow_missing: AllowMissing = False
) -> Iterator[Sample]:
    """Records and image bytes, as stored, in the order in which the boxes list the photographs.

    Boxes of groups ("more than five of these"), of things that are not there (Confidence 0) and boxes without area are
    left out.

    Args:
        folder: see the module's docstring for the files in it.
        split: train, validation or test.
        images_at: folders that hold the photographs, instead of the usual places.
        allow_missing: leave photographs out that are listed but absent, and log how many; a list takes their names.

    Raises:
        FileNotFoundError: no boxes, no classes, no photographs, or one is absent.
        ValueError: a file that does not follow the format; names the file, the line and the column.
    """
    part = part_of(folder, split)
    boxes_at = only(folder, *_either(f"*{split}-annotations-bbox.csv"), f"{split}/labels/detections.csv")
    classes_at = only(folder, *_either("*class-descriptions-boxable.csv"), f"{split}/metadata/classes.csv")
    origins_at = only(folder, *_either(f"*{split}-images*with-rotation.csv"), f"{split}/metadata/image_ids.csv")
    if boxes_at is None or classes_at is None:
        absent = f"{split}-annotations-bbox.csv" if boxes_at is None else "class-descriptions-boxable.csv"
        raise FileNotFoundError(f"{folder}: no {absent}, in it or in annotations/ of it")
    labels = _labels(classes_at)
    origins = {origin.ImageID: origin for _, origin in _rows(Origin, origins_at)} if origins_at else {}
    done: set[str] = set()
    places = (split, f"images/{split}", f"{split}/data", "images")
    with Photographs(folder, *places, at=images_at, allow_missing=allow_missing) as images:
        for image_id, rows in groupby(_rows(Row, boxes_at), key=lambda pair: pair[1].ImageID):
            with entry():
                if image_id in done:
                    raise ValueError(f"{boxes_at}: rows of {image_id} in two places; they have to follow each other")
                done.add(image_id)
                found = images.find(f"{boxes_at.name} lists {image_id}", f"{image_id}.jpg")
                if found is None:
                    continue
                objects = []
                for where, row in rows:
                    with entry(where):
                        objects += _objects(where, row, labels, found)
                origin = origins.get(image_id, Origin(ImageID=image_id))
                made = record(
                    f"{boxes_at}: image {image_id}",
                    found,
                    id=image_id,
                    source=SOURCE,
                    split=part,
                    objects=objects,
                    licence=origin.License,
                    credit=" ".join(filter(None, [origin.Author, origin.OriginalURL])),
                    same_as=known_as(origin.OriginalURL),
                )
                yield made, found.image


def _objects(where: str, row: Row, labels: dict[str, str], found: Found) -> list[Object]:
    if row.LabelName not in labels:
        raise ValueError(f"{where}: LabelName {row.LabelName!r} is not among the {len(labels)} classes")
    shares = (row.XMin * found.width, row.YMin * found.height, row.XMax * found.width, row.YMax * found.height)
    box = found.inside(shares)
    meant = row.IsGroupOf is not True and row.Confidence > 0
    return [Object(box_xyxy=box, label=labels[row.LabelName])] if meant and box is not None else []


def _either(name: str) -> tuple[str, str]:
    return name, f"annotations/{name}"


def _labels(path: Path) -> dict[str, str]:
    """``/m/011k07`` to ``Tortoise``; the file has a heading from version 7 on."""
    labels = {}
    for where, cells in load_cells(path):
        with entry():
            if len(cells) != 2:
                raise ValueError(f"{where}: expected two columns, the class and its name, found {','.join(cells)}")
            if labels.setdefault(*cells) != cells[1]:
                raise ValueError(f"{where}: class {cells[0]} is {cells[1]!r}, and was {labels[cells[0]]!r} before")
    return labels


def _rows(kind: type[Kind], path: Path) -> Iterator[tuple[str, Kind]]:
    """Rows as checked objects, each with the name it has in messages."""
    heading, rows = load_table(path)
    if "ImageID" not in heading:
        raise ValueError(f"{path}: no column ImageID; found {','.join(heading)}")
    for where, row in rows:
        with entry():
            yield where, checked(kind, where, row)
