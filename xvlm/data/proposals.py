"""Boxes among which a grounder may choose: those of the records' own objects, or what a detector found, from a file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from xvlm import boxes
from xvlm.data.records import Record
from xvlm.types import Proposals

Source = Literal["objects", "none"] | Path  # `objects`: those of the records; or a file, see from_file


def reader(source: Source) -> Callable[[Record], Proposals] | None:
    """What is proposed for a record; None where nothing ever is.

    Raises:
        FileNotFoundError, ValueError: as :func:`from_file`.
    """
    if source == "none":
        return None
    return from_file(source) if isinstance(source, Path) else of_objects


def of_objects(record: Record) -> Proposals:
    """The true boxes of a record's objects, each once: among them, finding is choosing."""
    return _proposals(record, torch.tensor(sorted({thing.box_xyxy for thing in record.objects})).reshape(-1, 4))


def from_file(file: Path) -> Callable[[Record], Proposals]:
    """Detections as X-VLM and ALBEF keep those of MAttNet (``dets.json``): ``{"image": [[left, top, width, height]]}``.

    A fifth number is the detector's confidence. Images are named by their record's id, or ``original_id``; boxes are in
    pixels of the stored image and are cut off at its border.

    Returns:
        The proposals of a record. It raises a ValueError that names file and record where the file does not have the
        record, or one of its boxes has no part in the image.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not such a JSON object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file of proposals")
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not readable as JSON: {error}") from None
    if not isinstance(known, dict):
        raise ValueError(f"{file}: expected an object of images and their boxes, found {type(known).__name__}")

    def of(record: Record) -> Proposals:
        name = record.id if record.id in known else record.original_id
        if name not in known:
            raise ValueError(
                f"{file}: has no proposals for record {record.id}; give it an empty list if there are none"
            )
        rows = _rows(known[name], f"{file}: image {name}")
        corners = boxes.clip(boxes.xywh_to_xyxy(rows[:, :4]), float(record.width), float(record.height))
        if not (inside := boxes.area(corners) > 0).all():
            i = int((~inside).nonzero()[0])
            found = f"{record.width} x {record.height} pixels, left top width height {rows[i, :4].tolist()}"
            raise ValueError(f"{file}: image {name}: box {i} has no part in the image of {found}")
        return _proposals(record, corners, rows[:, 4])

    return of


def _rows(given: Any, where: str) -> torch.Tensor:
    """Left, top, width, height and confidence of each box."""
    if not isinstance(given, list):
        raise ValueError(f"{where}: expected a list of boxes, found {given!r}")
    for i, row in enumerate(given):
        numbers = isinstance(row, list) and all(type(value) in (int, float) for value in row)
        if not numbers or len(row) not in (4, 5):
            raise ValueError(f"{where}: box {i}: expected left, top, width, height and perhaps a score, found {row!r}")
    return torch.tensor([[*row, 1.0][:5] for row in given], dtype=torch.float).reshape(-1, 5)


def _proposals(record: Record, boxes_xyxy: torch.Tensor, scores: torch.Tensor | None = None) -> Proposals:
    scores = torch.ones(len(boxes_xyxy)) if scores is None else scores
    return Proposals(boxes_xyxy, scores, (record.width, record.height))
