"""VQA v2 and NLVR2: files written as they are published, real questions if at hand, and broken files."""

import json
import shutil
from itertools import groupby
from pathlib import Path

import pytest
from photographs import place, real

from xvlm.data.readers import nlvr2, vqa
from xvlm.data.records import Question, Statement

# ---------------------------------------------------------------------------------------------------------------------
# VQA


def write_vqa(folder: Path, subset: str, rows: list[dict], *, answers: bool = True) -> None:
    """The two published files, from rows with image_id, question_id, question, answer_type and answers (texts)."""
    about = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}, "data_subtype": subset}
    questions = [{key: row[key] for key in ("image_id", "question_id", "question")} for row in rows]
    (folder / f"v2_OpenEnded_mscoco_{subset}_questions.json").write_text(json.dumps(about | {"questions": questions}))
    annotations = [
        {
            "image_id": row["image_id"],
            "question_id": row["question_id"],
            "question_type": "what",
            "answer_type": row["answer_type"],
            "multiple_choice_answer": row["answers"][0],
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": i}
                for i, answer in enumerate(row["answers"], 1)
            ],
        }
        for row in rows
    ]
    if answers:
        file = {**about, "annotations": annotations}
        (folder / f"v2_mscoco_{subset}_annotations.json").write_text(json.dumps(file))


def row(number: int, image: int, *answers: str) -> dict:
    asked = {"image_id": image, "question_id": number, "question": f"What is {number}?"}
    return asked | {"answer_type": "other", "answers": list(answers)}


ROWS = [row(1, 9, *["net"] * 7, *["nets"] * 3), row(2, 25, "yes"), row(3, 9, "a", "b", "a", "a")]


@pytest.mark.parametrize("split", ["train", "train2014"])
@pytest.mark.parametrize("image", ["train2014/COCO_train2014_", "images/train2014/COCO_train2014_", "../train2017/"])
def test_vqa_weights_are_shares(tmp_path, split, image):
    folder = tmp_path / "vqa"
    folder.mkdir()
    write_vqa(folder, "train2014", ROWS)
    place(folder.parent if image.startswith("..") else folder, *(f"{image.lstrip('./')}{i:012d}.jpg" for i in (9, 25)))
    (first, _), (second, _) = vqa.read(folder, split)
    assert (first.id, first.source, first.split, first.same_as) == ("9", "vqa", "train", {"coco": "9"})
    assert first.questions == [
        Question(text="What is 1?", answers={"net": 0.7, "nets": 0.3}, kind="other", id="1"),
        Question(text="What is 3?", answers={"a": 0.75, "b": 0.25}, kind="other", id="3"),
    ]
    assert [question.id for question in second.questions] == ["2"]


@pytest.mark.parametrize(("split", "subset"), [("test", "test2015"), ("test-dev", "test-dev2015")])
def test_vqa_test_has_no_answers(tmp_path, split, subset):
    write_vqa(tmp_path, subset, ROWS[:1], answers=False)
    place(tmp_path, "test2015/COCO_test2015_000000000009.jpg")
    ((record, _),) = vqa.read(tmp_path, split)
    assert (record.split, record.questions) == ("test", [Question(text="What is 1?", id="1")])


def test_vqa_that_is_wrong(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match=r"no v2_OpenEnded_mscoco_val20\?\?_questions\.json"):
        list(vqa.read(tmp_path, "val"))
    write_vqa(tmp_path, "val2014", ROWS, answers=False)
    with pytest.raises(FileNotFoundError, match=r"no annotations of v2_OpenEnded_mscoco_val2014_questions\.json"):
        list(vqa.read(tmp_path, "val"))
    write_vqa(tmp_path, "val2014", ROWS)
    place(tmp_path, "val2014/COCO_val2014_000000000009.jpg")
    with pytest.raises(FileNotFoundError, match=r"000000000025\.jpg: no such photograph"):
        list(vqa.read(tmp_path, "val"))
    assert len(list(vqa.read(tmp_path, "val", allow_missing=True))) == 1
    assert "1 of 2 photographs are absent" in caplog.text
    answers_at = tmp_path / "v2_mscoco_val2014_annotations.json"
    answers = json.loads(answers_at.read_text())
    answers_at.write_text(json.dumps(answers | {"annotations": answers["annotations"][:1]}))
    with pytest.raises(ValueError, match=r"val2014_annotations\.json: no answers to question_id 2"):
        list(vqa.read(tmp_path, "val"))


def test_real_vqa(tmp_path):
    folder = real("coco_train2017_mini")
    rows = [json.loads(line) for line in (folder / "vqa_v2.jsonl").read_text().splitlines()]
    write_vqa(tmp_path, "train2014", rows)
    shutil.copytree(folder / "images", tmp_path / "train2017")
    records = [record for record, _ in vqa.read(tmp_path, "train")]
    assert len(records) == len(list(groupby(sorted(one["image_id"] for one in rows))))
    questions = [question for record in records for question in record.questions]
    assert len(questions) == len(rows) == 42
    assert all(sum(question.answers.values()) == pytest.approx(1) for question in questions)
    train = next(question for question in questions if question.id == "71002")
    assert train.answers == {"from": 0.8, "away from": 0.1, "away": 0.1}


# ---------------------------------------------------------------------------------------------------------------------
# NLVR2


def line(identifier: str, sentence: str, label: str, **more) -> str:
    pair = {
        "left_url": "http://x/l.jpg",
        "right_url": "http://x/r.jpg",
        "writer": 1,
        "synset": "acorn",
        "validation": {},
    }
    return json.dumps(pair | {"sentence": sentence, "identifier": identifier, "label": label} | more)


TRAIN = [
    line("train-10171-0-0", "An image shows one leather pencil case.", "False", directory=37),
    line("train-10171-0-1", "There are two acorns. ", "True", directory=37),
    line("train-3-2-0", "Left is empty.", "True", directory=5),
]


@pytest.mark.parametrize("image", ["images/train/{d}", "images/train", "train", "images"])
@pytest.mark.parametrize("sentences", ["train.json", "nlvr2/data/train.json"])
def test_nlvr2_statements_are_the_left_photographs(tmp_path, image, sentences):
    (tmp_path / sentences).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / sentences).write_text("\n".join(TRAIN) + "\n")
    for pair, directory in (("train-10171-0", 37), ("train-3-2", 5)):
        place(tmp_path / image.format(d=directory), f"{pair}-img0.png", f"{pair}-img1.png")
    records = [record for record, _ in nlvr2.read(tmp_path, "train")]
    assert [record.id for record in records] == [
        *("train-10171-0-img1", "train-10171-0-img0"),
        *("train-3-2-img1", "train-3-2-img0"),
    ]
    right, left = records[:2]
    assert (right.statements, right.credit) == ([], "http://x/r.jpg")
    assert left.statements == [
        Statement(
            text="An image shows one leather pencil case.",
            other="train-10171-0-img1",
            label=False,
            id="train-10171-0-0",
        ),
        Statement(text="There are two acorns.", other="train-10171-0-img1", label=True, id="train-10171-0-1"),
    ]


def test_nlvr2_that_is_wrong(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match=r"no test1\.json, in it, in data/ or in nlvr2/data/ of it"):
        list(nlvr2.read(tmp_path, "test1"))
    (tmp_path / "dev.json").write_text(line("dev-1-0-0", "a", "True") + "\n" + line("dev-2-0-0", "b", "True"))
    place(tmp_path, "images/dev/dev-1-0-img0.png", "images/dev/dev-1-0-img1.png", "images/dev/dev-2-0-img0.png")
    with pytest.raises(
        FileNotFoundError, match=r"dev-2-0-img1\.png: no such photograph, .*dev\.json line 2 is about it"
    ):
        list(nlvr2.read(tmp_path, "dev"))
    kept = [record for record, _ in nlvr2.read(tmp_path, "dev", allow_missing=True)]
    assert [(record.id, record.split) for record in kept] == [("dev-1-0-img1", "val"), ("dev-1-0-img0", "val")]
    assert "1 of 4 photographs are absent: dev-2-0-img1.png" in caplog.text
    for wrong, message in [
        (line("dev-1-0-0", "a", "maybe"), r"dev\.json line 1: label: .* \(found 'maybe'\)"),
        (line("dev", "a", "True"), r"dev\.json line 1: identifier 'dev'; expected one like train-10171-0-0"),
    ]:
        (tmp_path / "dev.json").write_text(wrong)
        with pytest.raises(ValueError, match=message):
            list(nlvr2.read(tmp_path, "dev"))
