"""Reads Objects365: photographs with boxes of 365 classes.

Files as published (Shao et al. 2019, https://www.objects365.org), version 1 or 2, COCO's format::

    folder/annotations/zhiyuan_objv2_{split}.json        or objects365_{split}.json (version 1); in the folder, or in
                                                         folder/{split}/, as well
    folder/images/v1/patch8/FILE                         as ``file_name`` says, or folder/{split}/patch8/FILE,
                                                         folder/images/{split}/patch8/FILE, or without the patch

Boxes are ``xywh`` in pixels. The file is held in memory, as objects that take several times its size: that of version
2's train, gigabytes itself, needs a large machine.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from xvlm.data.readers.coco import InstanceFile, instances_of, labels_of, objects_of
from xvlm.data.readers.entries import by_id, entry, load, only, part_of
from xvlm.data.readers.photographs import AllowMissing, Photographs, Sample, record

SOURCE = "objects365"


def read(
    folder: Path, split: str, *, images_at: Sequence[Path] = (), allow_missing: AllowMissing = False
) -> Iterator[Sample]:
    """Records and image bytes, as stored, of the photographs that have objects, in the file's order.

    Boxes are cut off at the border of the image; crowds and boxes without area are left out.

    Args:
        folder: see the module's docstring for the files in it.
        split: train or val.
        images_at: folders that hold the photographs, instead of the usual places.
        allow_missing: leave photographs out that are listed but absent, and log how many; a list takes their names.

    Raises:
        FileNotFoundError: no annotations, no photographs, or one is absent.
        ValueError: a file that does not follow the format; names the file, the entry and the field.
    """
    part = part_of(folder, split)
    names = (f"zhiyuan_objv2_{split}.json", f"objects365_{split}.json")
    path = only(folder, *(f"{place}{name}" for place in ("annotations/", "", f"{split}/") for name in names))
    if path is None:
        raise FileNotFoundError(f"{folder}: no {' or '.join(names)}, nor in annotations/ or {split}/ of it")
    file = load(InstanceFile, path)
    photographs, labels = by_id(f"{path}: images.", file.images), labels_of(path, file)
    instances = instances_of(path, file, photographs, labels)
    places = (f"images/{split}", split, "images", ".")
    with Photographs(folder, *places, at=images_at, allow_missing=allow_missing) as images:
        for photograph in photographs.values():
            with entry():
                if photograph.id not in instances:
                    continue
                name = Path(photograph.file_name)
                names_of_copies = (photograph.file_name, f"{name.parent.name}/{name.name}", name.name)
                found = images.find(f"{path}: image {photograph.id} lists it", *dict.fromkeys(names_of_copies))
                if found is None:
                    continue
                found = found.of_size(photograph.width, photograph.height)
                made = record(
                    f"{path}: image {photograph.id}",
                    found,
                    id=str(photograph.id),
                    source=SOURCE,
                    split=part,
                    objects=objects_of(path, instances[photograph.id], labels, found, masks=False),
                    original_id=photograph.file_name,
                )
                yield made, found.image
