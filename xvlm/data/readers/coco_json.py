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

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator

from xvlm.data.readers.coco import Outline, bounds_of, mask_of
from xvlm.data.readers.entries import Four, Origins, by_id, entry, files_of, load, numbered, part_of
from xvlm.data.readers.photographs import (
    AllowMissing,
    Found,
    Photographs,
    Sample,
    corners,
    known_as,
    record,
    tidy,
)
from xvlm.data.records import Object, Record, Region, is_unchecked

Id = int | str

UNPLACED = "annotations left out, without caption, bbox and outline"

logger = logging.getLogger(__name__)


class Picture(BaseModel):
    id: Id
    file_name: str
    width: int | None = None
    height: int | None = None


class Annotation(BaseModel):
    image_id: Id
    bbox: Annotated[Four | None, BeforeValidator(lambda box: None if box == [] else box)] = None
    segmentation: Outline = []
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


class Listed(NamedTuple):
    """What one file says of an image; each annotation with the name it has in messages."""

    where: str
    picture: Picture
    said: list[tuple[str, Annotation]]
    labels: dict[Id, str]


def read(
    folder: Path,
    split: str,
    *,
    files: Sequence[Path] = (),
    images_at: Sequence[Path] = (),
    allow_missing: AllowMissing = False,
    masks: bool = False,
) -> Iterator[Sample]:
    """Records and image bytes, as stored, in the order in which the files list the images; those of one name are one.

    An annotation with a box and a caption becomes a region, whatever its category; with a box and a category an object
    (its ``attributes``, if a list of words, too); with a caption alone a caption. An object without a box has the one
    around its outline, and without that is left out. Boxes are cut off at the border of the image.

    Args:
        folder: see the module's docstring for the files in it.
        split: a name that begins with train, val, dev or test.
        files: of the annotations, where it is not the one of this split in the folder.
        images_at: folders that hold the photographs, instead of the usual places.
        allow_missing: leave images out that are listed but absent, and log how many; a list takes their names.
        masks: also keep what outlines the boxes.

    Raises:
        FileNotFoundError: no annotations, or an image is absent.
        ValueError: a file that does not follow the format, a box that is not in the image, an annotation of no image or
            category, or an image of another size than the file says; names the file, the entry and the field.
    """
    part = part_of(folder, split)
    names = (f"{split}.json", f"*_{split}.json")
    names = (*names, *(f"annotations/{name}" for name in names), f"{split}/_annotations.coco.json")
    listed_of: dict[str, list[Listed]] = defaultdict(list)
    for path in files_of(folder, files, *names):
        for listed in _listed(path):
            listed_of[tidy(listed.picture.file_name)].append(listed)
    source = folder.resolve().name
    places = (f"images/{split}", split, "images", ".")
    outlines = images_read = silent = 0
    with Photographs(folder, *places, at=images_at, allow_missing=allow_missing) as images:
        for file_name, listed in listed_of.items():
            with entry():
                found = images.find(f"{listed[0].where} lists it", file_name)
                if found is None:
                    continue
                for _, picture, _, _ in listed:
                    if picture.width is not None and picture.height is not None:
                        found = found.of_size(picture.width, picture.height)
                outlines += sum(bool(annotation.segmentation) for one in listed for _, annotation in one.said)
                of = {"id": images.id_of(file_name), "source": source, "split": part}
                made = _record(listed, found, masks, of)
                images_read += 1
                silent += not (made.captions or made.regions or made.objects)
                yield made, found.image
    if silent:
        logger.warning("%s: %d of %d images have no text", folder, silent, images_read)
    if outlines and not masks:
        logger.warning("%s: %d outlines were left out (--masks or corpus.masks=true keeps them)", folder, outlines)


def _listed(path: Path) -> Iterator[Listed]:
    file = load(File, path)
    labels = {number: one.name for number, one in by_id(f"{path}: categories.", file.categories).items()}
    pictures = by_id(f"{path}: images.", file.images)
    said: dict[Id, list[tuple[str, Annotation]]] = defaultdict(list)
    for where, annotation in numbered(f"{path}: annotations.", file.annotations):
        with entry():
            if annotation.image_id not in pictures:
                raise ValueError(f"{where}: image_id {annotation.image_id!r} is not among the images that can be read")
            if annotation.caption is None and annotation.category_id not in labels:
                raise ValueError(
                    f"{where}: no caption, and category_id {annotation.category_id!r} is not among the file's "
                    f"{len(labels)} categories"
                )
            said[annotation.image_id].append((where, annotation))
    for picture in pictures.values():
        yield Listed(f"{path}: image {picture.id!r}", picture, said[picture.id], labels)


def _record(listed: list[Listed], found: Found, masks: bool, of: dict[str, str]) -> Record:
    captions: list[str] = []
    regions: list[Region] = []
    objects: list[Object] = []
    origins: Origins = {}
    for where, annotation, labels in ((*said, one.labels) for one in listed for said in one.said):
        with entry(where):
            text = annotation.caption
            if text is not None and not text.strip():
                raise ValueError(f"{where}: caption is empty")
            if text is not None and annotation.bbox is None:
                captions.append(text.strip())
                continue
            size = found.width, found.height
            box = corners(annotation.bbox) if annotation.bbox else bounds_of(where, annotation.segmentation, size)
            if box is None:
                if is_unchecked():
                    raise ValueError(f"{where}: no caption, no bbox and no outline; packing leaves it out")
                found.boxes[UNPLACED] += 1
                continue
            box = found.nearly_inside(where, box)
            mask = mask_of(where, annotation.segmentation, size) if masks else None
            if text is not None:
                origins["regions", len(regions)] = where
                regions.append(Region(box_xyxy=box, descriptions=[text.strip()], mask=mask))
            else:
                given = annotation.attributes if isinstance(annotation.attributes, list) else []
                words = [word for word in given if isinstance(word, str) and word.strip()]
                origins["objects", len(objects)] = where
                label = labels[annotation.category_id]
                objects.append(Object(box_xyxy=box, label=label, attributes=words, mask=mask))
    picture = listed[0].picture
    return record(
        listed[0].where,
        found,
        origins,
        captions=captions,
        regions=regions,
        objects=objects,
        original_id=str(picture.id),
        same_as=known_as(picture.file_name),
        **of,
    )
