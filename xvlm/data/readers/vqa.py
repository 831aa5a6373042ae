"""Reads VQA v2 (and v1): questions about COCO's photographs with ten answers each.

Files as published (Goyal et al. 2017, https://visualqa.org/download.html)::

    folder/v2_OpenEnded_mscoco_{split}2014_questions.json     test: 2015; without v2_ for version 1
    folder/v2_mscoco_{split}2014_annotations.json             test has none; both may lie in a subfolder
    folder/{split}2014/COCO_{split}2014_000000000009.jpg      or in images/, in the parent, or as COCO 2017 names them:
                                                              {split}2017/000000000009.jpg

No boxes. Questions of Visual Genome are read with :mod:`xvlm.data.readers.visual_genome`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel

from xvlm.data.readers.entries import by_id, entry, load, only, part_of
from xvlm.data.readers.photographs import AllowMissing, Photographs, Sample, record
from xvlm.data.records import Question

SOURCE = "vqa"
LICENCE = "annotations CC BY 4.0, photographs under their terms at Flickr"


class Asked(BaseModel):
    image_id: int
    question: str
    question_id: int


class QuestionFile(BaseModel):
    data_subtype: str
    questions: list[Asked]


class Answer(BaseModel):
    answer: str


class Answered(BaseModel):
    question_id: int
    answers: list[Answer]
    answer_type: str = ""


class AnswerFile(BaseModel):
    annotations: list[Answered]


def read(
    folder: Path, split: str, *, images_at: Sequence[Path] = (), allow_missing: AllowMissing = False
) -> Iterator[Sample]:
    """Records and image bytes, as stored: one per photograph, with all its questions.

    An answer's weight is the share of the annotators who gave it, as in the reference (dataset/vqa_dataset.py); the
    official accuracy of an answer is min(1, 10/3 of that). A question's kind is its answer type: yes/no, number, other.

    Args:
        folder: see the module's docstring for the files in it.
        split: train, val, test or test-dev, with or without the year.
        images_at: folders that hold the photographs, instead of the usual places.
        allow_missing: leave photographs out that are listed but absent, and log how many; a list takes their names.

    Raises:
        FileNotFoundError: no questions, no answers (except of test), no photographs, or one is absent.
        ValueError: a file that does not follow the format; names the file, the entry and the field.
    """
    part = part_of(folder, split)
    year = "" if split[-1:].isdigit() else "20??"
    pattern = f"*OpenEnded_mscoco_{split}{year}_questions.json"
    questions_at = only(folder, pattern, f"*/{pattern}")
    if questions_at is None:
        raise FileNotFoundError(f"{folder}: no v2_OpenEnded_mscoco_{split}{year}_questions.json, in it or a subfolder")
    asked = load(QuestionFile, questions_at)
    name = questions_at.name.replace("OpenEnded_", "").replace("_questions", "_annotations")
    answers_at = only(folder, name, f"*/{name}")
    if answers_at is None and part != "test":
        raise FileNotFoundError(f"{folder}: no annotations of {questions_at.name}; they hold the answers")
    given = load(AnswerFile, answers_at).annotations if answers_at else []
    answers = by_id(f"{answers_at}: annotations.", given, "question_id")
    questions: dict[int, list[Question]] = defaultdict(list)
    for one in by_id(f"{questions_at}: questions.", asked.questions, "question_id").values():
        with entry(f"{questions_at}: question_id {one.question_id}"):
            if answers_at is not None and one.question_id not in answers:
                raise ValueError(f"{answers_at}: no answers to question_id {one.question_id}")
            answered = answers.get(one.question_id, Answered(question_id=one.question_id, answers=[]))
            weights = shares([answer.answer for answer in answered.answers])
            question = Question(
                text=one.question.strip(), answers=weights, kind=answered.answer_type, id=str(one.question_id)
            )
            questions[one.image_id].append(question)
    subset = asked.data_subtype.replace("-dev", "")
    named = (subset, f"{part}2017", f"images/{subset}", f"images/{part}2017", "images")
    with Photographs(
        folder, *named, *(f"../{place}" for place in named), at=images_at, allow_missing=allow_missing
    ) as images:
        for image_id, about in questions.items():
            with entry():
                names = (f"COCO_{subset}_{image_id:012d}.jpg", f"{image_id:012d}.jpg")
                found = images.find(f"{questions_at.name} asks about it", *names)
                if found is not None:
                    made = record(
                        f"{questions_at}: image {image_id}",
                        found,
                        id=str(image_id),
                        source=SOURCE,
                        split=part,
                        questions=about,
                        licence=LICENCE,
                        same_as={"coco": str(image_id)},
                    )
                    yield made, found.image


def shares(answers: Sequence[str]) -> dict[str, float]:
    """Each different answer and how often it was given, as a share of all."""
    return {answer: count / len(answers) for answer, count in Counter(answers).items()}
