"""X-VLM's lines for pre-training and the JSON arrays for fine-tuning: as the reference reads them, and broken ones."""

import json
from base64 import b64encode, encodebytes
from pathlib import Path

import pytest
from photographs import jpeg, place

from xvlm.data.readers import albef_json, xvlm_jsonl
from xvlm.data.records import Expression, Object, Question, Region, Statement

LINE = {
    "elems": [
        {"caption": "dog", "attributes": ["brown", "small"], "bb": [10, 20, 50, 40]},
        {"caption": ["a dog", "the pet"], "bb": [10, 20, 50, 40.5]},
        {"caption": "window", "attributes": "closed", "bb": [90, 0, 30, 10]},
        {"caption": "elsewhere", "bb": [100, 0, 30, 10]},
    ],
    "caption": "a dog ",
    "binary": b64encode(jpeg(100, 80)).decode(),
}


def write(path: Path, *lines: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train/part-00000"])
def test_lines_for_pretraining(tmp_path, name):
    write(tmp_path / name, LINE, {"image_rpath": "a/1.jpg", "caption": ["a", "b"]}, {"image": "a/1.jpg", "desc": "c"})
    if "/" in name:
        (tmp_path / "train/_SUCCESS").touch()
    place(tmp_path, "a/1.jpg")
    (first, image), (second, _), (third, _) = xvlm_jsonl.read(tmp_path, "train")
    stem = Path(name).stem
    assert [first.id, second.id] == [f"{stem}_00000001", f"{stem}_00000002"]
    assert (image, first.source) == (jpeg(100, 80), tmp_path.name)
    assert first.captions == ["a dog"]
    assert first.objects == [
        Object(box_xyxy=(10, 20, 60, 60), label="dog", attributes=["brown", "small"]),
        Object(box_xyxy=(90, 0, 100, 10), label="window", attributes=["closed"]),
    ]
    assert first.regions == [Region(box_xyxy=(10, 20, 60, 60.5), descriptions=["a dog", "the pet"])]
    assert (second.captions, second.original_id, third.captions) == (["a", "b"], "a/1.jpg", ["c"])


def test_base64_may_be_broken_into_lines(tmp_path):
    write(tmp_path / "train.jsonl", LINE | {"binary": encodebytes(jpeg(100, 80)).decode()})
    ((_, image),) = xvlm_jsonl.read(tmp_path, "train")
    assert image == jpeg(100, 80)


def test_lines_have_paths_from_the_folder_or_absolute(tmp_path):
    place(tmp_path, "elsewhere/1.jpg", "set/images/1.jpg")
    write(tmp_path / "set/val.jsonl", {"image": str(tmp_path / "elsewhere/1.jpg"), "caption": "a"}, {"image": "1.jpg"})
    assert [record.split for record, _ in xvlm_jsonl.read(tmp_path / "set", "val")] == ["val", "val"]


def test_lines_that_are_wrong(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match=r"no train\.jsonl or train\.json or train/\*"):
        list(xvlm_jsonl.read(tmp_path, "train"))
    for line, message in [
        ({"caption": "a"}, r"train\.jsonl line 1: no image; expected it in binary"),
        (LINE | {"binary": "AA?="}, r"train\.jsonl line 1: binary: not base64: .*found 'AA\?='"),
        (LINE | {"binary": "AAAA"}, r"train\.jsonl line 1: image cannot be decoded"),
        (LINE | {"elems": [{"caption": "a", "bb": [1, 2, 3]}]}, r"train\.jsonl line 1: elems\.0\.bb"),
        (LINE | {"elems": [{"caption": [""], "bb": [1, 2, 3, 4]}]}, r"the caption of the box \(1.*\) is empty"),
    ]:
        write(tmp_path / "train.jsonl", line)
        with pytest.raises(ValueError, match=message):
            list(xvlm_jsonl.read(tmp_path, "train"))
    write(tmp_path / "train.jsonl", {"image": "1.jpg"}, LINE)
    with pytest.raises(FileNotFoundError, match=r"1\.jpg: no such photograph, but .*train\.jsonl line 1 lists it"):
        list(xvlm_jsonl.read(tmp_path, "train"))
    assert len(list(xvlm_jsonl.read(tmp_path, "train", allow_missing=True))) == 1
    assert "1 of 2 photographs are absent: 1.jpg" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# JSON arrays

COCO = "val2014/COCO_val2014_000000391895.jpg"


def read(folder: Path, *rows: dict, name: str = "vqa_train.json", **options) -> list:
    (folder / name).write_text(json.dumps(rows))
    place(folder, COCO, "l.png", "r.png")
    return [record for record, _ in albef_json.read(folder, "train", **options)]


def test_captions_of_one_image_are_one_record(tmp_path):
    rows = [{"image": COCO, "caption": "a", "image_id": "coco_1"}, {"image": COCO, "caption": ["b", "c"]}]
    (record,) = read(tmp_path, *rows, name="train.json")
    assert (record.id, record.captions) == ("val2014_COCO_val2014_000000391895", ["a", "b", "c"])
    assert (record.original_id, record.same_as) == (COCO, {"coco": "391895"})


def test_questions_have_the_weights_of_the_reference(tmp_path):
    asked = {"image": COCO, "question": "What is it?"}
    (record,) = read(
        tmp_path,
        asked | {"question_id": 7, "dataset": "vqa", "answer": ["net", "net", "nets", "net"]},
        asked | {"question_id": 8, "dataset": "vg", "answer": "a net"},
        asked | {"question_id": "x9"},
    )
    assert record.questions == [
        Question(text="What is it?", answers={"net": 0.75, "nets": 0.25}, kind="vqa", id="7"),
        Question(text="What is it?", answers={"a net": 0.5}, kind="vg", id="8"),
        Question(text="What is it?", id="x9"),
    ]


def test_pairs_become_statements_of_the_left_image(tmp_path):
    right, left = read(tmp_path, {"images": ["l.png", "r.png"], "sentence": "two dogs", "label": "True"})
    assert (right.id, right.statements) == ("r_png", [])
    assert left.statements == [Statement(text="two dogs", other="r_png", label=True)]
    (tmp_path / "l.jpg").write_bytes(jpeg(9, 9))
    pair = {"images": ["l.png", "l.jpg"], "sentence": "two dogs", "label": "False"}
    right, left = read(tmp_path, pair)
    assert left.statements[0].other == right.id != left.id
    alone = {"images": ["l.png", "gone.png"], "sentence": "two dogs", "label": "True"}
    (left,) = read(tmp_path, alone, allow_missing=True)
    assert (left.id, left.statements) == ("l_png", [])


def test_expressions_with_boxes_and_without(tmp_path):
    said = {"image": COCO, "text": "left dog", "ref_id": 3, "width": 100, "height": 80}
    (record,) = read(
        tmp_path, said | {"bbox": [10, 20, 30, 40], "dets": [[1, 2, 3, 4]]}, {"image": COCO, "text": "a cat"}
    )
    assert record.expressions == [Expression(text="left dog", box_xyxy=(10, 20, 40, 60), id="3")]
    assert record.captions == ["a cat"]


def test_rows_that_are_wrong(tmp_path):
    for row, message in [
        ({"caption": "a"}, "row 0: expected the path of one image, or of two in images"),
        ({"images": ["l.png"], "sentence": "a", "label": "True"}, "row 0: expected the path of one image"),
        ({"images": ["l.png", "r.png"], "sentence": "a"}, "row 0: two images, but no sentence or no label"),
        ({"images": ["l.png", "r.png"], "sentence": "a", "label": "yes"}, r"0\.label: .* \(found 'yes'\)"),
        ({"image": COCO, "text": "a", "bbox": [90, 0, 90, 80]}, r"row 0: box \(90, 0, 180, 80\) as left"),
        ({"image": COCO, "text": "a", "bbox": [0, 0, 9, 8], "width": 9, "height": 8}, "its boxes are in pixels of 9x8"),
    ]:
        with pytest.raises(ValueError, match=message):
            read(tmp_path, row)
    with pytest.raises(FileNotFoundError, match=r"gone\.png: no such photograph, .*train\.json: row 0 lists it"):
        read(tmp_path, {"images": ["l.png", "gone.png"], "sentence": "a", "label": "True"})
    (tmp_path / "nlvr_train.json").touch()
    with pytest.raises(ValueError, match=r"one file \*_train\.json, found nlvr_train\.json, vqa_train\.json"):
        list(albef_json.read(tmp_path, "train"))
