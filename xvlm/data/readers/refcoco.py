"""Reads RefCOCO, RefCOCO+, RefCOCOg, ReferIt (RefCLEF) and gRefCOCO: photographs with referring expressions.

Files as published (Kazemzadeh et al. 2014, Yu et al. 2016, https://github.com/lichengunc/refer; gRefCOCO: Liu et al.
2023)::

    folder/refs(unc).p                 or (google), (umd), (berkeley); refs(unc).json; gRefCOCO: grefs(unc).json
    folder/instances.json              COCO's format; gRefCOCO's own, with other annotations
    folder/images/FILE                 or COCO's train2014 in the folder, in its parent, in images/ or
                                       images/mscoco/images/ of either; ReferIt: saiapr_tc-12 likewise, with
                                       38/images/38097.jpg in it, or 38097.jpg

Boxes are ``xywh`` in pixels. Several files of refs may lie in the folder: a split then says which, ``val_umd``. The
folder's name becomes the records' source. Other JSON forms of the same sets: :mod:`xvlm.data.readers.refcoco_json`.
"""

import io
import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel

from xvlm.data.readers.coco import Instance, InstanceFile, Photograph, outline_of, united
from xvlm.data.readers.entries import by_id, checked, entry, load, part_of
from xvlm.data.readers.photographs import (
    AllowMissing,
    Found,
    Photographs,
    Sample,
    around,
    corners,
    known_as,
    record,
)
from xvlm.data.records import Expression

SETS = ("images/mscoco/images/train2014", "images/train2014", "train2014", "images/saiapr_tc-12", "saiapr_tc-12")
PLACES = (*SETS, *(f"../{place}" for place in SETS), "images", "../images")

_BY = re.compile(r"g?refs\((\w+)\)\.(?:p|json)")


class Sentence(BaseModel):
    sent_id: int
    sent: str
    raw: str = ""


class Ref(BaseModel):
    ref_id: int
    image_id: int
    ann_id: int | list[int]
    split: str
    sentences: list[Sentence]
    no_target: bool = False

    @property
    def targets(self) -> list[int]:
        """Annotations it names: one, in gRefCOCO several, or none (written -1)."""
        named = self.ann_id if isinstance(self.ann_id, list) else [self.ann_id]
        return [] if self.no_target else [number for number in named if number != -1]


def read(
    folder: Path, split: str, *, images_at: Sequence[Path] = (), allow_missing: AllowMissing = False, masks: bool = True
) -> Iterator[Sample]:
    """Records and image bytes, as stored: one per photograph of the split, with all its expressions.

    An expression has the text as the data set cleaned it (``sent``). Where it names several things, ``boxes_xyxy`` has
    their boxes and ``box_xyxy`` the box around them; where it names nothing in the image, there is no box. Boxes are
    cut off at the border, empty texts are left out. Parts such as testA are of the split test and remain as a tag.

    Args:
        folder: see the module's docstring for the files in it.
        split: train, val, test, testA, testB, ...; with several files of refs, ``testA_unc``.
        images_at: folders that hold the photographs, instead of the usual places.
        allow_missing: leave photographs out that are listed but absent, and log how many; a list takes their names.
        masks: also keep what outlines the things.

    Raises:
        FileNotFoundError: no refs, no instances.json, no photographs, or one is absent.
        ValueError: a file that does not follow the format, a pickle that wants to build more than containers, texts and
            numbers, a split that is not in it, or several files of refs to choose from; names file, entry and field.
    """
    refs_at, part = _chosen(folder, split)
    refs = _refs(refs_at)
    chosen = [ref for ref in refs if ref.split == part]
    if not chosen:
        parts = ", ".join(sorted({ref.split for ref in refs}))
        raise ValueError(f"{refs_at}: no expression of split {part!r}; it has {parts}")
    instances_at = folder / "instances.json"
    instances = load(InstanceFile, instances_at)
    photographs = by_id(f"{instances_at}: images.", instances.images)
    annotations = by_id(f"{instances_at}: annotations.", instances.annotations)
    refs_of: dict[int, list[Ref]] = {}
    for ref in chosen:
        refs_of.setdefault(ref.image_id, []).append(ref)
    root = folder.resolve()
    with Photographs(root, *PLACES, at=images_at, allow_missing=allow_missing) as images:
        for image_id, image_refs in refs_of.items():
            with entry():
                if image_id not in photographs:
                    raise ValueError(f"{instances_at}: no image {image_id}, which {refs_at.name} refers to")
                photograph = photographs[image_id]
                found = images.find(f"{refs_at.name} refers to it", *_names(photograph))
                if found is None:
                    continue
                found = found.of_size(photograph.width, photograph.height)
                expressions = []
                for ref in image_refs:
                    where = f"{refs_at}: ref {ref.ref_id}"
                    with entry(where):
                        if absent := [number for number in ref.targets if number not in annotations]:
                            raise ValueError(f"{where}: ann_id {absent[0]} is not in {instances_at}")
                        targets = [annotations[number] for number in ref.targets]
                        expressions += _expressions(where, instances_at, ref, targets, found, masks)
                made = record(
                    f"{refs_at}: image {image_id}",
                    found,
                    id=str(image_id),
                    source=root.name,
                    split=part_of(folder, part),
                    expressions=expressions,
                    tags=[] if part in ("train", "val", "test") else [part],
                    same_as=known_as(photograph.file_name),
                )
                yield made, found.image


def _names(photograph: Photograph) -> list[str]:
    """Under which it may lie: as written, or of ReferIt, in the folders of its archive or outside them."""
    name = Path(photograph.file_name).name
    return [photograph.file_name, name, f"{photograph.id // 1000:02d}/images/{name}"]


def _chosen(folder: Path, split: str) -> tuple[Path, str]:
    """The file of refs and the part of it that a split names."""
    by = {match[1]: path for path in sorted(folder.glob("*refs(*)*")) if (match := _BY.fullmatch(path.name))}
    part, _, named = split.partition("_")
    if not by:
        raise FileNotFoundError(f"{folder}: no refs(unc).p, refs(google).p, refs(umd).p or the like, nor as .json")
    if not named and len(by) == 1:
        named = next(iter(by))
    if named not in by:
        raise ValueError(f"{folder}: split {split!r}; expected one of {', '.join(f'{part}_{name}' for name in by)}")
    return by[named], part


def _refs(path: Path) -> list[Ref]:
    if path.suffix == ".json":
        return load(list[Ref], path)
    try:
        # Written by Python 2, whose strings are bytes.
        loaded = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="utf-8", errors="replace").load()
    except Exception as error:  # a broken pickle raises whatever its opcodes trip over
        raise ValueError(f"{path}: not readable as a pickle of plain values: {error}") from None
    return checked(list[Ref], str(path), loaded)


class _PlainUnpickler(pickle._Unpickler):
    """Builds lists, tuples, dictionaries, texts and numbers, and runs nothing.

    Python's own rather than the one in C, which takes memory for as many values as ten bytes of a file say there are;
    three times as slow, a few seconds for RefCOCO.
    """

    dispatch: ClassVar = {code: do for code, do in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants {module}.{name}")


def _expressions(
    where: str, instances_at: Path, ref: Ref, targets: list[Instance], found: Found, masks: bool
) -> list[Expression]:
    boxes = [found.nearly_inside(where, corners(target.bbox)) for target in targets]
    outlines = [outline_of(instances_at, target, found) for target in targets] if masks else []
    mask = united([one.model_dump() for one in outlines if one], (found.height, found.width))
    return [
        Expression(
            text=text,
            box_xyxy=around(boxes) if boxes else None,
            boxes_xyxy=boxes if len(boxes) > 1 else [],
            mask=mask,
            id=str(sentence.sent_id),
        )
        for sentence in ref.sentences
        if (text := sentence.sent.strip() or sentence.raw.strip())
    ]
