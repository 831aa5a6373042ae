"""Reads COCO: photographs with captions, labelled boxes and masks.

Files as published (Lin et al. 2014, https://cocodataset.org/#format-data)::

    folder/annotations/captions_{split}.json      either or both
    folder/annotations/instances_{split}.json
    folder/images/{split}/FILE                    or folder/{split}/FILE or folder/images/FILE

Boxes are ``xywh`` in pixels. Objects365 and the RefCOCO family write their boxes and masks in this format too.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.dataclasses import dataclass

from xvlm.data.readers.entries import Four, Number, by_id, entry, load
from xvlm.data.readers.photographs import AllowMissing, Found, Photographs, Sample, corners, known_as, record
from xvlm.data.records import RLE, Box, Object, is_mask

SOURCE = "coco"


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


Outline = list[list[Number]] | RunLengths | list[RunLengths]  # polygons, or a mask or several


@dataclass(slots=True)  # no model: Objects365 has millions of them
class Instance:
    id: int
    image_id: int
    category_id: int
    bbox: Four
    iscrowd: bool = False
    segmentation: Outline = field(default_factory=list)


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


NO_CAPTIONS = CaptionFile(images=[], annotations=[])
NO_INSTANCES = InstanceFile(images=[], annotations=[], categories=[])


def read(
    folder: Path,
    split: str,
    *,
    images_at: Sequence[Path] = (),
    allow_missing: AllowMissing = False,
    require_boxes: bool = False,
    masks: bool = False,
) -> Iterator[Sample]:
    """Records and image bytes, as stored, in the order in which the annotations list the photographs.

    Captions become captions, instances objects: ``xywh`` boxes turned into ``xyxy`` and cut off at the border of the
    image. Crowds ("some of these many people") and boxes without area are left out.

    Args:
        folder: see the module's docstring for the files in it.
        split: the name in the files' names, with or without a year: train, val2014, test2017.
        images_at: folders that hold the photographs, instead of the usual places.
        allow_missing: leave photographs out that are annotated but absent, and log how many; a list takes their names.
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
        there = ", ".join(sorted(path.name for path in captions_at.parent.glob("*.json"))) or "none"
        raise FileNotFoundError(
            f"{folder}: neither annotations/{captions_at.name} nor annotations/{instances_at.name}; found {there}"
        )
    if require_boxes and not instances_at.exists():
        raise FileNotFoundError(f"{instances_at}: no such file; without it {split} has captions but no boxes")
    captioned = load(CaptionFile, captions_at) if captions_at.exists() else NO_CAPTIONS
    boxed = load(InstanceFile, instances_at) if instances_at.exists() else NO_INSTANCES
    photographs = by_id(f"{captions_at}: images.", captioned.images) | by_id(f"{instances_at}: images.", boxed.images)
    labels = labels_of(instances_at, boxed)
    captions = _captions(captions_at, captioned, photographs)
    instances = instances_of(instances_at, boxed, photographs, labels)
    licences = {one.id: f"{one.name} {one.url}".strip() for one in captioned.licenses + boxed.licenses}
    with Photographs(folder, f"images/{split}", split, "images", at=images_at, allow_missing=allow_missing) as images:
        for photograph in photographs.values():
            with entry():
                found = images.find(f"the annotations of {split} list image {photograph.id}", photograph.file_name)
                if found is None:
                    continue
                boxes = instances.get(photograph.id, [])
                if boxes:
                    found = found.of_size(photograph.width, photograph.height)
                made = record(
                    f"{folder}: image {photograph.id}",
                    found,
                    id=str(photograph.id),
                    source=SOURCE,
                    split=part,
                    captions=captions.get(photograph.id, []),
                    objects=objects_of(instances_at, boxes, labels, found, masks),
                    licence=licences.get(photograph.license, ""),
                    credit=photograph.flickr_url,
                    same_as=known_as(photograph.flickr_url),
                )
                yield made, found.image


def _captions(path: Path, file: CaptionFile, photographs: dict[int, Photograph]) -> dict[int, list[str]]:
    captions = defaultdict(list)
    for annotation in file.annotations:
        with entry():
            _known(path, annotation, photographs)
            text = " ".join(annotation.caption.split())  # some are typed over two lines
            if not text:
                raise ValueError(f"{path}: annotation {annotation.id}: caption is empty")
            captions[annotation.image_id].append(text)
    return captions


def labels_of(path: Path, file: InstanceFile) -> dict[int, str]:
    """The name of each category. Raises ValueError where two have the same id."""
    return {number: category.name for number, category in by_id(f"{path}: categories.", file.categories).items()}


def instances_of(
    path: Path, file: InstanceFile, photographs: dict[int, Photograph], labels: dict[int, str]
) -> dict[int, list[Instance]]:
    """The annotations of each photograph.

    Raises:
        ValueError: an annotation of no photograph or category of the file; names it.
    """
    instances = defaultdict(list)
    for annotation in file.annotations:
        with entry():
            _known(path, annotation, photographs)
            if annotation.category_id not in labels:
                raise ValueError(
                    f"{path}: annotation {annotation.id}: category_id {annotation.category_id} is not among the file's "
                    f"{len(labels)} categories"
                )
            instances[annotation.image_id].append(annotation)
    return instances


def objects_of(
    path: Path, instances: list[Instance], labels: dict[int, str], found: Found, masks: bool
) -> list[Object]:
    """Annotations as objects, boxes cut off at the photograph's border; crowds and boxes without area are left out.

    Raises:
        ValueError: a label without characters, or a mask that is none of this image; names the annotation.
    """
    objects = []
    for annotation in instances:
        with entry(f"{path}: annotation {annotation.id}"):
            box = found.inside(corners(annotation.bbox))
            if box is not None and not annotation.iscrowd:
                mask = outline_of(path, annotation, found) if masks else None
                objects.append(Object(box_xyxy=box, label=labels[annotation.category_id], mask=mask))
    return objects


def _known(path: Path, annotation: Caption | Instance, photographs: dict[int, Photograph]) -> None:
    if annotation.image_id not in photographs:
        raise ValueError(
            f"{path}: annotation {annotation.id}: image_id {annotation.image_id} is not among the images that can be "
            "read"
        )


def outline_of(path: Path, annotation: Instance, found: Found) -> RLE | None:
    """The mask of an annotation, as :func:`mask_of`."""
    where = f"{path}: annotation {annotation.id}"
    return mask_of(where, annotation.segmentation, (found.width, found.height))


def mask_of(where: str, shapes: Outline, size: tuple[int, int]) -> RLE | None:
    """What outlines something in an image of ``size`` (width, height), as a mask; None where nothing has an area.

    Raises:
        ValueError: an outline that makes no sense there; says where.
    """
    from pycocotools import mask as coco_mask

    where, (width, height) = f"{where}: segmentation", size
    encoded: list[Any] = []
    if isinstance(shapes, list) and all(isinstance(shape, list) for shape in shapes):
        for shape in shapes:
            _check_polygon(where, shape, width, height)
        # Fewer than three corners have no area, and the encoder would take four numbers for a box.
        polygons = [shape for shape in shapes if isinstance(shape, list) and len(shape) >= 6]
        encoded = coco_mask.frPyObjects(polygons, height, width) if polygons else []
    else:
        for runs in shapes if isinstance(shapes, list) else [shapes]:
            if runs.size != (height, width):
                raise ValueError(
                    f"{where} is of an image of {runs.size[1]}x{runs.size[0]}, the image is {width}x{height}"
                )
            if not is_mask(runs.size, runs.counts):
                raise ValueError(
                    f"{where}: expected run lengths of all {height * width} pixels of the image, found "
                    f"{runs.counts!r:.80}"
                )
            packed = isinstance(runs.counts, str)
            encoded.append(runs.model_dump() if packed else coco_mask.frPyObjects(runs.model_dump(), height, width))
    return united(encoded, (height, width))


def bounds_of(where: str, shapes: Outline, size: tuple[int, int]) -> Box | None:
    """The box around what outlines something, ``xyxy``; None where nothing has an area. Raises as :func:`mask_of`."""
    from pycocotools import mask as coco_mask

    outline = mask_of(where, shapes, size)
    if outline is None:
        return None
    x, y, w, h = coco_mask.toBbox(outline.model_dump()).tolist()
    return corners((x, y, w, h)) if w and h else None


def _check_polygon(where: str, polygon: list[float], width: int, height: int) -> None:
    """Raises ValueError about one that the encoder, which checks nothing, would read or write beyond its memory for."""
    if len(polygon) % 2:
        raise ValueError(f"{where}: expected pairs of x and y, found {len(polygon)} numbers")
    for x, y in zip(polygon[::2], polygon[1::2], strict=True):
        if not (-width <= x <= 2 * width and -height <= y <= 2 * height):
            raise ValueError(f"{where}: expected corners in or near the {width}x{height} image, found {x:g}, {y:g}")


def united(encoded: list[Any], size: tuple[int, int]) -> RLE | None:
    """Encoded masks of one image (``size``: height, width) as one; None where there are none."""
    from pycocotools import mask as coco_mask

    return RLE(size=size, counts=coco_mask.merge(encoded)["counts"].decode()) if encoded else None
