"""Reads your own COCO JSON: what labelling tools export, with boxes, captions, or both.

::

    folder/{split}.json                or *_{split}.json; in annotations/ as well; or {split}/_annotations.coco.json
    folder/{split}/FILE                or images/{split}/, images/, or the folder itself; as ``file_name`` says

    {"images":      [{"id": 1, "file_name": "a.jpg", "width": 640, "height": 480}],
     "categories":  [{"id": 1, "name": "dog"}],
     "annotations": [{"image_id": 1, "category_id": 1, "bbox": [10, 20, 100, 80]},
                     {"image_id": 1, "bbox": [10, 20, 100, 80], "caption": "a dog that sleeps"},
                     {"image_id": 1, "caption": "a dog on a sofa"}]}

Boxes are ``xywh`` (left, top, width, height) in pixels of the stored image. The folder's name becomes the records'
source. The file is held in memory. For COCO itself take :mod:`xvlm.data.readers.coco`.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from xvlm.data.readers.entries import Four, by_id, entry, load, numbered, only, part_of
from xvlm.data.readers.photographs import (
    AllowMissing,
    Found,
    Photographs,
    Sample,
    corners,
    identifier,
    known_as,
    nearly_inside,
    record,
)
from xvlm.data.records import Object, Record, Region

Id = int | str


class Picture(BaseModel):
    id: Id
    file_name: str
    width: int | None = None
    height: int | None = None


class Annotation(BaseModel):
    image_id: Id
    bbox: Four | None = None
    category_id: Id | None = None
    caption: str | None = None
    attributes: Any = None  # a list of words; some tools write flags of their own here


class Category(BaseModel):
    id: Id
    name: str


class File(BaseModel):
    images: list[Picture]
    annotations: list[Annotation]
    categories: list[Category] = []


def read(
    folder: Path, split: str, *, file: Path | None = None, allow_missing: AllowMissing = False
) -> Iterator[Sample]:
    """Records and image bytes, as stored, in the order in which the file lists the images.

    An annotation with a box and a caption becomes a region, whatever its category; with a box and a category an object
    (its ``attributes``, if a list of words, too); with a caption alone a caption. Boxes are cut off at the border of
    the image.

    Args:
        folder: see the module's docstring for the files in it.
        split: a name that begins with train, val, dev or test.
        file: of the annotations, where it has another name; None: the one of this split in the folder.
        allow_missing: leave images out that are listed but absent, and log how many; a list takes their names.

    Raises:
        FileNotFoundError: no annotations, or an image is absent.
        ValueError: a file that does not follow the format, a box that is not in the image, an annotation of no image or
            category, or an image of another size than the file says; names the file, the entry and the field.
    """
    part = part_of(folder, split)
    names = (f"{split}.json", f"*_{split}.json")
    path = file or only(folder, *names, *(f"annotations/{name}" for name in names), f"{split}/_annotations.coco.json")
    if path is None:
        raise FileNotFoundError(
            f"{folder}: neither {split}.json nor *_{split}.json, in it or in annotations/ of it, nor "
            f"{split}/_annotations.coco.json"
        )
    listed = load(File, path)
    labels = {number: one.name for number, one in by_id(f"{path}: categories.", listed.categories).items()}
    pictures = by_id(f"{path}: images.", listed.images)
    said: dict[Id, list[tuple[str, Annotation]]] = defaultdict(list)
    for where, annotation in numbered(f"{path}: annotations.", listed.annotations):
        with entry():
            if annotation.image_id not in pictures:
                raise ValueError(f"{where}: image_id {annotation.image_id!r} is not among the images that can be read")
            if annotation.caption is None and annotation.category_id not in labels:
                raise ValueError(
                    f"{where}: no caption, and category_id {annotation.category_id!r} is not among the file's "
                    f"{len(labels)} categories"
                )
            if annotation.caption is None and annotation.bbox is None:
                raise ValueError(f"{where}: no caption and no bbox")
            said[annotation.image_id].append((where, annotation))
    source = folder.resolve().name
    with Photographs(folder, f"images/{split}", split, "images", ".", allow_missing=allow_missing) as images:
        for picture in pictures.values():
            with entry():
                where = f"{path}: image {picture.id!r}"
                found = images.find(f"{where} lists it", picture.file_name)
                if found is None:
                    continue
                if picture.width is not None and picture.height is not None:
                    found = found.of_size(picture.width, picture.height)
                of = {"source": source, "split": part}
                yield _record(where, picture, said[picture.id], labels, found, of), found.image


def _record(
    where: str,
    picture: Picture,
    said: list[tuple[str, Annotation]],
    labels: dict[Id, str],
    found: Found,
    of: dict[str, str],
) -> Record:
    captions: list[str] = []
    regions: list[Region] = []
    objects: list[Object] = []
    for where_said, annotation in said:
        with entry(where_said):
            text = annotation.caption
            if text is not None and not text.strip():
                raise ValueError(f"{where_said}: caption is empty")
            if annotation.bbox is None:
                captions.append(text.strip())
                continue
            box = nearly_inside(where_said, corners(annotation.bbox), found.width, found.height)
            if text is not None:
                regions.append(Region(box_xyxy=box, descriptions=[text.strip()]))
            else:
                given = annotation.attributes if isinstance(annotation.attributes, list) else []
                words = [word for word in given if isinstance(word, str) and word.strip()]
                objects.append(Object(box_xyxy=box, label=labels[annotation.category_id], attributes=words))
    return record(
        where,
        found,
        id=identifier(picture.file_name),
        captions=captions,
        regions=regions,
        objects=objects,
        original_id=str(picture.id),
        same_as=known_as(picture.file_name),
        **of,
    )
