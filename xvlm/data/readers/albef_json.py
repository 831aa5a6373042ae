"""Reads the fine-tuning files of ALBEF, BLIP and X-VLM: JSON arrays of captions, questions, pairs or expressions.

As published with ALBEF (Li et al. 2021, https://github.com/salesforce/ALBEF) and X-VLM::

    folder/{split}.json                or *_{split}.json (coco_train.json, vqa_train.json, refcoco+_test.json)
    folder/FILE                        as ``image`` says: from the folder, from images/ of it, or absolute

What a row has decides what it is (the reference's dataset/: re, vqa, nlvr, grounding, coco_karpathy)::

    {"image", "caption"}                                             captions: a text or several
    {"image", "question", "answer"[, "question_id", "dataset"]}      a question
    {"images": [left, right], "sentence", "label": "True"}           a statement about two images
    {"image", "text", "bbox": [x, y, w, h][, "ref_id"]}              a referring expression
    {"image", "text"}                                                the same without its box: a caption

Boxes are ``xywh`` in pixels. The folder's name becomes the records' source. The file is held in memory.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from xvlm.data.readers.entries import Four, entry, files_of, load, numbered, part_of
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
from xvlm.data.readers.vqa import shares
from xvlm.data.records import Expression, Question, Record, Statement

ONE_ANSWER = 0.5  # weight of an answer that is no list (the reference: dataset/vqa_dataset.py)


class Row(BaseModel):
    image: str = ""
    images: Annotated[list[str], Field(max_length=2)] = []
    caption: str | list[str] = []
    question: str = ""
    answer: str | list[str] = []
    question_id: int | str = ""
    dataset: str = ""
    sentence: str = ""
    label: Literal["True", "False"] | None = None
    text: str = ""
    bbox: Four | None = None
    ref_id: int | str = ""
    width: int | None = None
    height: int | None = None


def read(
    folder: Path,
    split: str,
    *,
    files: Sequence[Path] = (),
    images_at: Sequence[Path] = (),
    allow_missing: AllowMissing = False,
) -> Iterator[Sample]:
    """Records and image bytes, as stored: one per image, with all that its rows say.

    The weight of an answer is its share of a list of answers; of an answer that is no list, 0.5. A pair's statement is
    the left image's; it is left out where the right one is absent.

    Args:
        folder: see the module's docstring for the files in it.
        split: a name in the file's name that begins with train, val, dev or test.
        files: of the annotations, where it is not the one of this split in the folder.
        images_at: folders that hold the photographs, instead of the usual places.
        allow_missing: leave images out that are listed but absent, and log how many; a list takes their names.

    Raises:
        FileNotFoundError: no rows, or an image is absent.
        ValueError: a file that does not follow the format; names the file, the row and the field.
    """
    part = part_of(folder, split)
    rows_of: dict[str, list[tuple[str, Row]]] = {}
    listed_by: dict[str, str] = {}
    for path in files_of(folder, files, f"{split}.json", f"*_{split}.json"):
        for where, row in numbered(f"{path}: row ", load(list[Row], path)):
            with entry():
                if bool(row.image) == (len(row.images) == 2):
                    raise ValueError(f"{where}: expected the path of one image, or of two in images")
                row.images = [tidy(name) for name in row.images]
                for name in (tidy(row.image),) if row.image else reversed(row.images):
                    rows = rows_of.setdefault(name, [])
                    listed_by.setdefault(name, where)
                rows.append((where, row))
    source = folder.resolve().name
    with Photographs(folder, ".", "images", at=images_at, allow_missing=allow_missing) as images:
        for name, rows in rows_of.items():
            with entry():
                found = images.find(f"{listed_by[name]} lists it", name)
                if found is not None:
                    of = {"id": images.id_of(name), "source": source, "split": part}
                    yield _record(listed_by[name], name, rows, images, found, of), found.image


def _record(
    where: str, name: str, rows: list[tuple[str, Row]], images: Photographs, found: Found, of: dict[str, str]
) -> Record:
    captions: list[str] = []
    questions: list[Question] = []
    statements: list[Statement] = []
    expressions: list[Expression] = []
    for where_said, row in rows:
        with entry(where_said):
            said = [row.caption] if isinstance(row.caption, str) else row.caption
            if not all(text.strip() for text in said):
                raise ValueError(f"{where_said}: caption is empty")
            if not (said or row.question or row.images or row.text):
                raise ValueError(f"{where_said}: no words; expected a caption, question or text")
            captions += said
            if row.question:
                weights = {row.answer: ONE_ANSWER} if isinstance(row.answer, str) else shares(row.answer)
                asked = Question(text=row.question, answers=weights, kind=row.dataset, id=str(row.question_id))
                questions.append(asked)
            elif row.images:
                if not row.sentence or row.label is None:
                    raise ValueError(f"{where_said}: two images, but no sentence or no label")
                if images.locate(row.images[1]):
                    other = images.id_of(row.images[1])
                    statements.append(Statement(text=row.sentence, other=other, label=row.label == "True"))
            elif row.text and row.bbox is None:
                captions.append(row.text)
            elif row.text:
                if row.width is not None and row.height is not None:
                    found = found.of_size(row.width, row.height)
                box = found.nearly_inside(where_said, corners(row.bbox))
                expressions.append(Expression(text=row.text, box_xyxy=box, id=str(row.ref_id)))
    return record(
        where,
        found,
        captions=captions,
        questions=questions,
        statements=statements,
        expressions=expressions,
        original_id=name,
        same_as=known_as(name),
        **of,
    )
