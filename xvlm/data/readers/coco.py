"""Reads COCO: photographs with captions, labelled boxes and masks.

Files as published (Lin et al. 2014, https://cocodataset.org/#format-data)::

    folder/annotations/captions_{split}.json      either or both
    folder/annotations/instances_{split}.json
    folder/images/{split}/FILE                    or folder/{split}/FILE or folder/images/FILE
"""

import logging
from collections import defaultdict
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ValidationError

from xvlm.data.records import RLE, Box, Object, Record

SOURCE = "coco"

logger = logging.getLogger(__name__)


class Photograph(BaseModel):
    id: int
    file_name: str
    width: int
    height: int
    license: int | None = None
    flickr_url: str = ""


class Licence(BaseModel):
    id: int
    name: str
    url: str = ""


class Caption(BaseModel):
    id: int
    image_id: int
    caption: str


class RunLengths(BaseModel):
    size: tuple[int, int]
    counts: str | list[int]


class Instance(BaseModel):
    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: bool = False
    segmentation: list[list[float]] | RunLengths = []


class Category(BaseModel):
    id: int
    name: str


class CaptionFile(BaseModel):
    images: list[Photograph]
    annotations: list[Caption]
    licenses: list[Licence] = []


class InstanceFile(BaseModel):
    images: list[Photograph]
    annotations: list[Instance]
    categories: list[Category]
    licenses: list[Licence] = []


File = TypeVar("File", CaptionFile, InstanceFile)

NO_CAPTIONS = CaptionFile(images=[], annotations=[])
NO_INSTANCES = InstanceFile(images=[], annotations=[], categories=[])


def read(
    folder: Path, split: str, *, allow_missing: bool = False, require_boxes: bool = False, masks: bool = False
) -> Iterator[tuple[Record, bytes]]:
    """Records and image bytes, as stored, in the order in which the annotations list the photographs.

    Captions become captions, instances objects: ``xywh`` boxes turned into ``xyxy`` and cut off at the border of the
    image. Crowds ("some of these many people") and boxes without area are left out.

    Args:
        folder: see the module's docstring for the files in it.
        split: the name in the files' names, with or without a year: train, val2014, test2017.
        allow_missing: leave photographs out that are annotated but absent, and log how many.
        require_boxes: refuse a split that has captions only.
        masks: also keep the objects' masks.

    Raises:
        FileNotFoundError: no annotations, no boxes where they are required, no photographs, or one is absent.
        ValueError: a file that does not follow the format; names the file, the entry and the field.
    """
    part = split.rstrip("0123456789")
    if part not in ("train", "val", "test"):
        raise ValueError(f"{folder}: split {split!r}; expected train, val or test, with or without a year")
    captions_at, instances_at = (folder / "annotations" / f"{kind}_{split}.json" for kind in ("captions", "instances"))
    if not captions_at.exists() and not instances_at.exists():
        raise FileNotFoundError(f"{folder}: neither annotations/{captions_at.name} nor annotations/{instances_at.name}")
    if require_boxes and not instances_at.exists():
        raise FileNotFoundError(f"{instances_at}: no such file; without it {split} has captions but no boxes")
    captioned = _load(CaptionFile, captions_at) if captions_at.exists() else NO_CAPTIONS
    boxed = _load(InstanceFile, instances_at) if instances_at.exists() else NO_INSTANCES
    photographs = {photograph.id: photograph for photograph in captioned.images + boxed.images}
    captions = _captions(captions_at, captioned, photographs)
    objects = _objects(instances_at, boxed, photographs, masks)
    licences = {one.id: f"{one.name} {one.url}".strip() for one in captioned.licenses + boxed.licenses}
    for photograph, path in _present(folder, split, list(photographs.values()), allow_missing):
        image = path.read_bytes()
        width, height = _size(path, image, photograph if photograph.id in objects else None)
        record = Record(
            id=str(photograph.id),
            source=SOURCE,
            split=part,
            width=width,
            height=height,
            captions=captions.get(photograph.id, []),
            objects=objects.get(photograph.id, []),
            licence=licences.get(photograph.license, ""),
            credit=photograph.flickr_url,
        )
        yield record, image


def _load(kind: type[File], path: Path) -> File:
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        found = "" if first["type"] == "missing" else f" (found {first['input']!r:.200})"
        raise ValueError(f"{path}: {where}: {first['msg']}{found}") from None


def _captions(path: Path, file: CaptionFile, photographs: dict[int, Photograph]) -> dict[int, list[str]]:
    captions = defaultdict(list)
    for annotation in file.annotations:
        _known(path, annotation, photographs)
        text = " ".join(annotation.caption.split())  # some are typed over two lines
        if not text:
            raise ValueError(f"{path}: annotation {annotation.id}: caption is empty")
        captions[annotation.image_id].append(text)
    return captions


def _objects(
    path: Path, file: InstanceFile, photographs: dict[int, Photograph], masks: bool
) -> dict[int, list[Object]]:
    labels = {category.id: category.name for category in file.categories}
    objects = defaultdict(list)
    for annotation in file.annotations:
        photograph = _known(path, annotation, photographs)
        if annotation.category_id not in labels:
            raise ValueError(
                f"{path}: annotation {annotation.id}: category_id {annotation.category_id} is not among the file's "
                f"{len(labels)} categories"
            )
        box = _inside(annotation.bbox, photograph)
        if box is None or annotation.iscrowd:
            continue
        mask = _mask(f"{path}: annotation {annotation.id}", annotation.segmentation, photograph) if masks else None
        objects[annotation.image_id].append(
            Object(box_xyxy=box, label=labels[annotation.category_id], mask=mask),
        )
    return objects


def _known(path: Path, annotation: Caption | Instance, photographs: dict[int, Photograph]) -> Photograph:
    if annotation.image_id not in photographs:
        raise ValueError(f"{path}: annotation {annotation.id}: image_id {annotation.image_id} is not among the images")
    return photographs[annotation.image_id]


def _inside(box_xywh: Box, photograph: Photograph) -> Box | None:
    """The part of a box in the image as ``xyxy``; None where there is none."""
    x, y, w, h = box_xywh
    left, right = (min(max(edge, 0.0), float(photograph.width)) for edge in (x, x + w))
    top, bottom = (min(max(edge, 0.0), float(photograph.height)) for edge in (y, y + h))
    return (left, top, right, bottom) if left < right and top < bottom else None


def _mask(where: str, segmentation: list[list[float]] | RunLengths, photograph: Photograph) -> RLE | None:
    from pycocotools import mask as coco_mask

    height, width = photograph.height, photograph.width
    if isinstance(segmentation, RunLengths):
        if segmentation.size != (height, width):
            raise ValueError(
                f"{where}: segmentation is of an image of {segmentation.size[1]}x{segmentation.size[0]}, "
                f"the image is {width}x{height}"
            )
        if isinstance(segmentation.counts, str):
            return RLE(size=segmentation.size, counts=segmentation.counts)
        encoded: Any = coco_mask.frPyObjects(segmentation.model_dump(), height, width)
    else:
        # Fewer than three corners have no area, and the encoder would take four numbers for a box.
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        if not polygons:
            return None
        encoded = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    return RLE(size=(height, width), counts=encoded["counts"].decode())


def _present(
    folder: Path, split: str, photographs: list[Photograph], allow_missing: bool
) -> Iterator[tuple[Photograph, Path]]:
    places = [folder / "images" / split, folder / split, folder / "images"]
    place = next((place for place in places if place.is_dir()), None)
    if place is None:
        raise FileNotFoundError(f"{folder}: no photographs; expected a folder {', '.join(str(p) for p in places)}")
    missing = []
    for photograph in photographs:
        path = place / photograph.file_name
        if path.exists():
            yield photograph, path
        elif allow_missing:
            missing.append(photograph.file_name)
        else:
            raise FileNotFoundError(
                f"{path}: no such photograph, but the annotations of {split} list it (allow_missing leaves it out)"
            )
    if missing:
        logger.warning("%s: %d of %d photographs are absent: %s …", place, len(missing), len(photographs), missing[0])


def _size(path: Path, image: bytes, boxed: Photograph | None) -> tuple[int, int]:
    """Width and height of the image, which have to be the annotated ones where boxes are in those pixels."""
    try:
        size = Image.open(BytesIO(image)).size
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not an image") from None
    if boxed is not None and size != (boxed.width, boxed.height):
        raise ValueError(
            f"{path}: the image is {size[0]}x{size[1]}, its boxes are in pixels of {boxed.width}x{boxed.height}"
        )
    return size
