"""Reads RefCOCO, RefCOCO+ and RefCOCOg in two JSON forms that circulate.

As MDETR wrote them, COCO's format with an image per expression (Kamath et al. 2021), or as SeqTR did, one file with a
list per split (Zhu et al. 2022)::

    folder/finetune_*_{split}.json     or
    folder/instances.json              {"train": [{"image_id", "bbox", "expressions", "width", "height"}, ...], ...}
    folder/images/FILE                 or COCO's train2014 in the folder, its parent, or images/ of either

Boxes are ``xywh`` in pixels. The folder's name becomes the records' source.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel

from xvlm.data.readers.entries import Four, by_id, entry, load, only, part_of
from xvlm.data.readers.photographs import AllowMissing, Photographs, Sample, corners, known_as, record
from xvlm.data.readers.refcoco import PLACES
from xvlm.data.records import Expression


class CaptionedImage(BaseModel):
    id: int
    file_name: str
    width: int
    height: int
    caption: str


class Target(BaseModel):
    image_id: int
    bbox: Four


class CaptionedFile(BaseModel):
    images: list[CaptionedImage]
    annotations: list[Target]


class Referred(BaseModel):
    image_id: int
    width: int
    height: int
    bbox: Four
    expressions: list[str]


class Said(BaseModel):
    """One or more expressions for one box, of either form."""

    file_name: str
    width: int
    height: int
    bbox: Four
    expressions: list[str]


def read(
    folder: Path, split: str, *, images_at: Sequence[Path] = (), allow_missing: AllowMissing = False
) -> Iterator[Sample]:
    """Records and image bytes, as stored: one per photograph of the split, with all its expressions.

    Boxes are cut off at the border, empty texts are left out. Parts such as testA are of the split test and remain as a
    tag.

    Args:
        folder: see the module's docstring for the files in it.
        split: train, val, test, testA, testB, ...
        images_at: folders that hold the photographs, instead of the usual places.
        allow_missing: leave photographs out that are listed but absent, and log how many; a list takes their names.

    Raises:
        FileNotFoundError: neither form's file, no photographs, or one is absent.
        ValueError: a file that does not follow the format, or a split that is not in it; names file, entry and field.
    """
    path = only(folder, f"finetune_*_{split}.json", "instances.json")
    if path is None:
        raise FileNotFoundError(f"{folder}: neither finetune_*_{split}.json nor instances.json")
    said_of: dict[str, list[Said]] = {}
    for one in _per_split(path, split) if path.name == "instances.json" else _captioned(path):
        said_of.setdefault(one.file_name, []).append(one)
    root = folder.resolve()
    with Photographs(root, *PLACES, at=images_at, allow_missing=allow_missing) as images:
        for file_name, said in said_of.items():
            with entry():
                found = images.find(f"{path.name} lists it", file_name)
                if found is None:
                    continue
                where, expressions = f"{path}: {file_name}", []
                for one in said:
                    with entry(where):
                        found = found.of_size(one.width, one.height)
                        box = found.nearly_inside(where, corners(one.bbox))
                        expressions += [Expression(text=text, box_xyxy=box) for text in one.expressions if text.strip()]
                same_as = known_as(file_name)
                made = record(
                    where,
                    found,
                    id=same_as.get("coco") or Path(file_name).stem,
                    source=root.name,
                    split=part_of(folder, split),
                    expressions=expressions,
                    tags=[] if split in ("train", "val", "test") else [split],
                    same_as=same_as,
                )
                yield made, found.image


def _captioned(path: Path) -> Iterator[Said]:
    file = load(CaptionedFile, path)
    pictures = by_id(f"{path}: images.", file.images)
    targets = by_id(f"{path}: annotations.", file.annotations, "image_id")
    for target in targets.values():
        with entry():
            if target.image_id not in pictures:
                raise ValueError(f"{path}: a box of image_id {target.image_id}, which is not among the file's images")
    for image in pictures.values():
        with entry():
            if image.id not in targets:
                raise ValueError(f"{path}: image {image.id}: no annotation has a box for its caption {image.caption!r}")
            size = {"width": image.width, "height": image.height}
            yield Said(file_name=image.file_name, bbox=targets[image.id].bbox, expressions=[image.caption], **size)


def _per_split(path: Path, split: str) -> Iterator[Said]:
    parts = load(dict[str, list[Referred]], path)
    if split not in parts:
        raise ValueError(f"{path}: no split {split!r}; it has {', '.join(parts)}")
    for one in parts[split]:
        yield Said(file_name=f"COCO_train2014_{one.image_id:012d}.jpg", **one.model_dump(exclude={"image_id"}))
