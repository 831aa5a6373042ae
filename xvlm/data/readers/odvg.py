"""Reads ODVG, the format of MM-Grounding-DINO and Open-GroundingDino: captions with boxed phrases, or labelled boxes.

JSON lines as their documentation shows (Zhao et al. 2024; mmdetection: configs/mm_grounding_dino),
in the folder or in annotations/::

    folder/{split}.jsonl               or {split}.json, *{split}*.jsonl, *{split}*_vg.json, *{split}*_od*.json
    folder/label_map.json              or *label_map*.json, where labels are numbers without ``category``
    folder/{split}/FILE                or images/{split}/, images/, or the folder itself; as ``filename`` says

Boxes are ``xyxy`` in pixels. The folder's name becomes the records' source. The file is held in memory.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel

from xvlm.data.readers.entries import Four, entry, files_of, load, load_lines, numbered, only, part_of
from xvlm.data.readers.photographs import (
    AllowMissing,
    Found,
    Photographs,
    Sample,
    around,
    known_as,
    record,
    tidy,
)
from xvlm.data.records import Box, Object, Phrase, Record, Region


class Grounded(BaseModel):
    bbox: Four | list[Four]
    phrase: str | list[str]
    tokens_positive: list[tuple[int, int]] = []


class Grounding(BaseModel):
    caption: str
    regions: list[Grounded]


class Instance(BaseModel):
    bbox: Four
    label: int | str | None = None
    category: str | None = None


class Detection(BaseModel):
    instances: list[Instance]


class Line(BaseModel):
    filename: str
    width: int
    height: int
    grounding: Grounding | None = None
    detection: Detection | None = None


Said = tuple[str, Line, dict[str, str]]  # what a line is called in messages, the line, the labels of its file


def read(
    folder: Path,
    split: str,
    *,
    files: Sequence[Path] = (),
    images_at: Sequence[Path] = (),
    allow_missing: AllowMissing = False,
) -> Iterator[Sample]:
    """Records and image bytes, as stored: one per photograph, with all that its lines say.

    A line with ``grounding`` gives a caption, a region per entry (the box around all of its boxes) and, where
    ``tokens_positive`` says which characters of the caption it is, a phrase with each of its boxes. A line with
    ``detection`` gives objects. Boxes are cut off at the border of the image; those without area are left out.

    Args:
        folder: see the module's docstring for the files in it.
        split: a name in the file's name that begins with train, val, dev or test.
        files: of the annotations, where it is not the one of this split in the folder.
        images_at: folders that hold the photographs, instead of the usual places.
        allow_missing: leave photographs out that are listed but absent, and log how many; a list takes their names.

    Raises:
        FileNotFoundError: no lines, no photographs, or one is absent.
        ValueError: a file that does not follow the format; names the file, the line and the field.
    """
    part = part_of(folder, split)
    names = (f"{split}.jsonl", f"{split}.json", f"*{split}*.jsonl", f"*{split}*_vg.json", f"*{split}*_od*.json")
    lines_of: dict[str, list[Said]] = {}
    for path in files_of(folder, files, *names, *(f"annotations/{name}" for name in names)):
        labels_at = only(path.parent, "*label_map*.json") or only(folder, "*label_map*.json")
        labels = load(dict[str, str], labels_at) if labels_at else {}
        for where, line in load_lines(Line, path):
            lines_of.setdefault(tidy(line.filename), []).append((where, line, labels))
    source = folder.resolve().name
    places = (split, f"images/{split}", "images", ".")
    with Photographs(folder, *places, at=images_at, allow_missing=allow_missing) as images:
        for name, lines in lines_of.items():
            with entry():
                found = images.find(f"{lines[0][0]} lists it", name)
                if found is not None:
                    of = {"id": images.id_of(name), "source": source, "split": part}
                    yield _record(name, lines, found, of), found.image


def _record(name: str, lines: list[Said], found: Found, of: dict[str, str]) -> Record:
    captions: list[str] = []
    regions: list[Region] = []
    phrases: list[Phrase] = []
    objects: list[Object] = []
    for where, line, labels in lines:
        with entry():
            found = found.of_size(line.width, line.height)
            if line.grounding is None and line.detection is None:
                raise ValueError(f"{where}: neither grounding nor detection")
            if line.grounding is not None:
                for one_at, one in numbered(f"{where}: grounding.regions.", line.grounding.regions):
                    with entry(one_at):
                        boxes = _boxes(one, found)
                        phrase = (one.phrase if isinstance(one.phrase, str) else " ".join(one.phrase)).strip()
                        if not phrase:
                            raise ValueError(f"{one_at}.phrase is empty")
                        if boxes:
                            regions.append(Region(box_xyxy=around(boxes), descriptions=[phrase]))
                            phrases += [
                                Phrase(caption=len(captions), start=start, end=end, boxes_xyxy=boxes)
                                for start, end in _joined(one.tokens_positive, line.grounding.caption)
                            ]
                captions.append(line.grounding.caption)
            if line.detection is not None:
                objects += _objects(where, line.detection, labels, found)
    return record(
        lines[0][0],
        found,
        captions=captions,
        regions=regions,
        phrases=phrases,
        objects=objects,
        original_id=name,
        same_as=known_as(name),
        **of,
    )


def _boxes(grounded: Grounded, found: Found) -> list[Box]:
    given = grounded.bbox if isinstance(grounded.bbox, list) else [grounded.bbox]
    clipped = (found.inside(box) for box in given)
    return [box for box in clipped if box is not None]


def _joined(spans: list[tuple[int, int]], caption: str) -> list[tuple[int, int]]:
    """Spans of single words as spans of phrases: those with only white space between them are one."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and not caption[joined[-1][1] : start].strip():
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _objects(where: str, detection: Detection, labels: dict[str, str], found: Found) -> list[Object]:
    objects = []
    for one_at, one in numbered(f"{where}: detection.instances.", detection.instances):
        with entry(one_at):
            label = one.category or labels.get(str(one.label))
            if label is None:
                raise ValueError(f"{one_at}: no category, and label {one.label!r} in no label_map")
            box = found.inside(one.bbox)
            if box is not None:
                objects.append(Object(box_xyxy=box, label=label))
    return objects
