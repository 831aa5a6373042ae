"""Whatever a file of annotations holds: records, or one clear error that names it; a check goes on behind it."""

import json
import re
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from photographs import place
from pydantic import ValidationError

from xvlm.data import check
from xvlm.data.readers.entries import listing


class Lines(list):
    """Documents, each on a line of its own."""


COCO = ["COCO_train2014_000000000001.jpg", "COCO_train2014_000000000002.jpg"]
OUTLINE = [[10, 20, 40, 20, 40, 60, 10, 60]]
SIZE = {"width": 100, "height": 80}
BOX = [10, 20, 30, 40]
PHOTOGRAPHS = [{"id": i, "file_name": name, **SIZE} for i, name in enumerate(COCO, 1)]
INSTANCES = {
    "images": PHOTOGRAPHS,
    "annotations": [
        {"id": i, "image_id": i, "category_id": 1, "bbox": BOX, "segmentation": OUTLINE, "iscrowd": 0} for i in (1, 2)
    ],
    "categories": [{"id": 1, "name": "dog"}],
}
GROUNDED = {"caption": "a dog", "regions": [{"bbox": [1, 2, 30, 40], "phrase": "dog", "tokens_positive": [[2, 5]]}]}

# Of each reader its files, each a document, lines or a table, with one entry or more about each of two photographs.
FILES: dict[str, dict[str, Any]] = {
    "coco": {
        "annotations/instances_train.json": INSTANCES,
        "annotations/captions_train.json": {
            "images": PHOTOGRAPHS,
            "annotations": [{"id": i, "image_id": i, "caption": "a dog"} for i in (1, 2)],
        },
    },
    "objects365": {"objects365_train.json": INSTANCES},
    "visual_genome": {
        "image_data.json": [{"image_id": i, "url": "", "coco_id": None, **SIZE} for i in (1, 2)],
        "objects.json": [
            {"image_id": i, "objects": [{"object_id": i, "x": 1, "y": 2, "w": 30, "h": 40, "names": ["dog"]}]}
            for i in (1, 2)
        ],
        "region_descriptions.json": [
            {"id": i, "regions": [{"region_id": i, "x": 1, "y": 2, "width": 30, "height": 40, "phrase": "a dog"}]}
            for i in (1, 2)
        ],
        "question_answers.json": [
            {"id": i, "qas": [{"qa_id": i, "question": "What?", "answer": "A."}]} for i in (1, 2)
        ],
    },
    "refcoco": {
        "refs(unc).json": [
            {"ref_id": i, "image_id": i, "ann_id": i, "split": "train", "sentences": [{"sent_id": i, "sent": "dog"}]}
            for i in (1, 2)
        ],
        "instances.json": INSTANCES,
    },
    "refcoco_json": {
        "finetune_refcoco_train.json": {
            "images": [one | {"caption": "the dog"} for one in PHOTOGRAPHS],
            "annotations": [{"image_id": i, "bbox": BOX} for i in (1, 2)],
        }
    },
    "vqa": {
        "v2_OpenEnded_mscoco_train2014_questions.json": {
            "data_subtype": "train2014",
            "questions": [{"image_id": i, "question": "What?", "question_id": i} for i in (1, 2)],
        },
        "v2_mscoco_train2014_annotations.json": {
            "annotations": [{"question_id": i, "answers": [{"answer": "dog"}], "answer_type": "other"} for i in (1, 2)]
        },
    },
    "nlvr2": {
        "train.json": Lines(
            {"identifier": f"train-{i}-0-0", "sentence": "Two dogs.", "label": "True", "directory": 1} for i in (1, 2)
        )
    },
    "odvg": {
        "train.jsonl": Lines(
            {
                "filename": name,
                **SIZE,
                "grounding": GROUNDED,
                "detection": {"instances": [{"bbox": [1, 2, 30, 40], "label": 0, "category": "dog"}]},
            }
            for name in COCO
        )
    },
    "grit": {
        f"0/{Path(name).stem}.json": {
            "key": Path(name).stem,
            "caption": "a dog",
            "url": "",
            "noun_chunks": [[0, 5, 0.1, 0.2, 0.3, 0.4, 0.9]],
            "ref_exps": [[2, 5, 0.1, 0.2, 0.3, 0.4, 0.9]],
        }
        for name in COCO
    },
    "xvlm_jsonl": {
        "train.jsonl": Lines(
            {"image": name, "caption": ["a dog"], "elems": [{"caption": "dog", "bb": BOX, "attributes": "old"}]}
            for name in COCO
        )
    },
    "albef_json": {
        "train.json": [
            row
            for name in COCO
            for row in (
                {"image": name, "caption": "a dog"},
                {"image": name, "question": "What?", "answer": ["dog"], "question_id": 1, "dataset": "vqa"},
                {"image": name, "text": "dog", "bbox": BOX, "ref_id": 5, **SIZE},
                {"images": [name, name], "sentence": "dogs", "label": "True"},
            )
        ]
    },
    "coco_json": {
        "train.json": INSTANCES
        | {
            "annotations": [
                said
                for i in (1, 2)
                for said in (
                    {"image_id": i, "category_id": 1, "bbox": BOX, "attributes": ["old"]},
                    {"image_id": i, "bbox": BOX, "caption": "a dog"},
                    {"image_id": i, "caption": "a dog"},
                )
            ]
        }
    },
    "json_lines": {
        "train.jsonl": Lines(
            {
                "image": name,
                **SIZE,
                "captions": ["a dog"],
                "regions": [{"box_xyxy": [1, 2, 30, 40], "descriptions": ["dog"]}],
                "objects": [{"box_xywh": BOX, "label": "dog"}],
                "phrases": [{"caption": 0, "start": 2, "end": 5, "boxes_xyxy": [BOX]}],
                "questions": [{"text": "What?", "answers": {"dog": 1.0}}],
            }
            for name in COCO
        )
    },
    "csv_table": {
        "train.csv": [
            ["image", "x", "y", "width", "height", "text", "label"],
            *([name, "10", "20", "30", "40", "dog", "dog"] for name in COCO),
        ]
    },
    "openimages": {
        "train-annotations-bbox.csv": [
            ["ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf"],
            *([Path(name).stem, "/m/1", "0.1", "0.3", "0.2", "0.4", "0"] for name in COCO),
        ],
        "class-descriptions-boxable.csv": [["/m/1", "Dog"], ["/m/2", "Cat"]],
    },
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    place(folder, *COCO, "1.jpg", "2.jpg", *(f"train-{i}-0-img{side}.png" for i in (1, 2) for side in (0, 1)))
    return folder


def write(folder: Path, pictures: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".csv":
            path.write_text("\n".join(",".join(map(str, row)) for row in content), encoding="utf-8")
        else:
            documents = content if isinstance(content, Lines) else [content]
            path.write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
    for name in ("images", "0") if (folder / "0").exists() else ("images",):
        (folder / name).mkdir(exist_ok=True)
        for picture in pictures.iterdir():
            (folder / name / picture.name).hardlink_to(picture)


def read(name: str, folder: Path):
    options = {"masks": True} if name == "coco" else {}
    return partial(import_module(f"xvlm.data.readers.{name}").read, folder, "train", **options)()


def places(document: Any, place: tuple = ()) -> list[tuple]:
    """Of every value in a document."""
    inside = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [*([place] if place else []), *(one for key, each in inside for one in places(each, (*place, key)))]


def changed(document: Any, place: tuple, change: str, value: Any) -> Any:
    document = type(document)(json.loads(json.dumps(document)))  # the same box in two places is two lists now
    parent = document
    for part in place[:-1]:
        parent = parent[part]
    if change == "put":
        parent[place[-1]] = value
    elif change == "twice" and isinstance(parent, list):
        parent.insert(place[-1], parent[place[-1]])
    else:
        del parent[place[-1]]
    return document


BAD = [None, True, -1, 0, 7, 2**70, 1e308, float("nan"), float("inf"), "", " ", "x", "\x00", "../a", "ä" * 300]
values = st.sampled_from([*BAD, [], {}, [[]], [None], [1, 2, 3], [1, 2, 3, 4, 5], [0, 0, 1e9, 1e9], {"x": 1}, ["", 1]])


@pytest.mark.parametrize("name", FILES)
def test_the_sound_files_are_read(tmp_path, pictures, name):
    write(tmp_path, pictures, FILES[name])
    assert len(list(read(name, tmp_path))) == (4 if name == "nlvr2" else 2)
    assert not check.check(check.read(read(name, tmp_path), str(tmp_path))).problems


@pytest.mark.parametrize("name", FILES)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_value_is_it_is_a_record_or_one_clear_error(tmp_path_factory, pictures, name, data):
    folder = tmp_path_factory.mktemp("hostile")
    file = data.draw(st.sampled_from(sorted(FILES[name])))
    document = FILES[name][file]
    is_table = file.endswith(".csv")
    place = data.draw(st.sampled_from([place for place in places(document) if len(place) > is_table]))
    change = data.draw(st.sampled_from(["put", "put", "put", "delete", "twice"]))
    write(folder, pictures, FILES[name] | {file: changed(document, place, change, data.draw(values))})
    message = ""
    try:
        list(read(name, folder))
    except (ValueError, OSError) as error:
        assert not isinstance(error, ValidationError)
        message = str(error)
        assert str(folder) in message and "\n" not in message and len(message) < 1000
    report = check.check(check.read(read(name, folder), str(folder)))
    if message:
        assert report.problems
    of_all = (is_table and place[0] == 0) or place[0] == "categories" or file.startswith("class")
    if any(isinstance(part, int) for part in place) and not of_all:
        assert report.records


FAR = [[1e9, 0, 5, 5, 9, 9]]  # of an outline; the encoder of masks would end the process
RUNS = {"size": [80, 100], "counts": [5, 10**6]}
TEXT_OF_RUNS = {"size": [80, 100], "counts": "5"}

# Of each reader: a file, what is put where in it, what a check then says in its order, and how much less is read.
WRONG = [
    (
        "coco",
        "annotations/instances_train.json",
        {("annotations", 0, "bbox"): [1, 2, 3], ("annotations", 1, "category_id"): 9},
        [
            r"instances_train\.json: annotations\.0\.bbox: expected 4 values \(found \[1, 2, 3\]\)",
            r"annotation 2: category_id 9 is not among the file's 1 categories",
        ],
        4,
    ),
    (
        "coco",
        "annotations/captions_train.json",
        {("annotations", 0, "caption"): 5, ("annotations", 1, "image_id"): 9},
        [r"annotations\.0\.caption: .*\(found 5\)", "annotation 2: image_id 9 is not among the images"],
        2,
    ),
    *(
        ("coco", "annotations/instances_train.json", {("annotations", 0, "segmentation"): shape}, [message], 2)
        for shape, message in [
            (FAR, r"annotation 1: segmentation: expected corners in or near the 100x80 image, found 1e\+09, 0"),
            ([[0, 0, 5, 5, 9]], r"annotation 1: segmentation: expected pairs of x and y, found 5 numbers"),
            ([[0, 0, 5, float("nan"), 9, 9]], r"annotations\.0\.segmentation: .* finite number"),
            (RUNS, r"segmentation: expected run lengths of all 8000 pixels of the image, found \[5, 1000000\]"),
            (RUNS | {"counts": [8001, -1]}, r"expected run lengths of all 8000 pixels"),
            (TEXT_OF_RUNS, r"segmentation: expected run lengths of all 8000 pixels"),
            (TEXT_OF_RUNS | {"counts": "é"}, r"expected run lengths of all 8000 pixels of the image, found 'é'"),
        ]
    ),
    (
        "objects365",
        "objects365_train.json",
        {("annotations", 0, "bbox"): None, ("categories", 0): {"id": 1, "name": ""}},
        [r"annotations\.0\.bbox: .*\(found None\)", r"annotation 2: label: .* at least 1 character"],
        2,
    ),
    (
        "visual_genome",
        "region_descriptions.json",
        {(0, "regions", 0, "x"): "1"},
        [r"region_descriptions\.json: 0\.regions\.0\.x: .* valid number \(found '1'\)"],
        1,
    ),
    (
        "refcoco",
        "refs(unc).json",
        {(0, "ann_id"): 9, (1, "sentences", 0): 5},
        [r"1\.sentences\.0: .*\(found 5\)", r"ref 1: ann_id 9 is not in .*instances\.json"],
        4,
    ),
    (
        "refcoco_json",
        "finetune_refcoco_train.json",
        {("annotations", 0, "image_id"): 9},
        ["a box of image_id 9, which is not among the file's images", "image 1: no annotation has a box for"],
        1,
    ),
    (
        "vqa",
        "v2_OpenEnded_mscoco_train2014_questions.json",
        {("questions", 0, "question"): " ", ("questions", 1, "question_id"): 9},
        ["question_id 1: text: .* at least 1 character", "no answers to question_id 9"],
        2,
    ),
    (
        "vqa",
        "v2_mscoco_train2014_annotations.json",
        {("annotations", 1, "question_id"): 1, ("annotations", 1, "answer_type"): "number"},
        [r"annotations\.1: question_id 1 is that of another entry before it", "no answers to question_id 2"],
        1,
    ),
    (
        "nlvr2",
        "train.json",
        {(0, "sentence"): " ", (1, "label"): True},
        [r"train\.json line 2: label: .*\(found True\)", r"train\.json line 1: text: .* at least 1 character"],
        2,
    ),
    (
        "odvg",
        "train.jsonl",
        {
            (0, "grounding", "regions", 0, "phrase"): " ",
            (0, "detection", "instances", 0, "category"): None,
            (1, "grounding"): None,
            (1, "detection"): None,
        },
        [
            r"line 1: grounding\.regions\.0\.phrase is empty",
            r"line 1: detection\.instances\.0: no category, and label 0 in no label_map",
            "line 2: neither grounding nor detection",
        ],
        7,
    ),
    (
        "grit",
        f"0/{Path(COCO[0]).stem}.json",
        {("noun_chunks", 0, 1): 6, ("ref_exps", 0, 0): -3},
        ["of the 5 characters of the caption, found 0 to 6", "of the caption, found -3 to 5"],
        2,
    ),
    (
        "xvlm_jsonl",
        "train.jsonl",
        {(0, "elems", 0, "caption"): ["", " "], (1, "elems", 0, "bb"): [1, 2, 3]},
        [r"line 1: elems\.0: the caption of the box .* is empty", r"line 2: elems\.0\.bb: expected 4 values"],
        2,
    ),
    (
        "albef_json",
        "train.json",
        {(0, "caption"): "", (1, "question"): "", (1, "answer"): "", (2, "bbox"): [1, 2, 3], (5, "answer"): 5},
        [
            r"train\.json: 2\.bbox: expected 4 values",
            r"train\.json: 5\.answer: .*\(found 5\)",
            "row 0: caption is empty",
            "row 1: no words; expected a caption, question or text",
        ],
        4,
    ),
    (
        "coco_json",
        "train.json",
        {
            ("annotations", 0, "bbox"): [1, 2, 3],
            ("annotations", 1, "bbox"): [60, 20, 90, 70],
            ("annotations", 2, "caption"): 5,
            ("annotations", 4, "caption"): "",
            ("annotations", 5, "image_id"): 9,
        },
        [
            r"train\.json: annotations\.0\.bbox: expected 4 values \(found \[1, 2, 3\]\)",
            r"train\.json: annotations\.2\.caption: Input should be a valid string \(found 5\)",
            r"train\.json: annotations\.5: image_id 9 is not among the images",
            r"train\.json: annotations\.1: box \(60, 20, 150, 90\) as left, top, right, bottom; expected",
            r"train\.json: annotations\.4: caption is empty",
        ],
        5,
    ),
    (
        "coco_json",
        "train.json",
        {("images", 1, "id"): 1, ("categories", 0): {"id": 1, "name": ""}},
        [
            r"images\.1: id 1 is that of another entry before it",
            *(rf"annotations\.{i}: image_id 2 is not among the images" for i in (3, 4, 5)),
            r"annotations\.0: label: .* at least 1 character",
        ],
        4,
    ),
    (
        "json_lines",
        "train.jsonl",
        {(0, "objects", 0, "box_xywh"): [1, 2, 3], (1, "captions"): "dog", (1, "width"): [], (1, "regions"): 3},
        [
            r"line 1: objects\.0\.box_xywh: expected 4 values",
            r"line 2: width: .*\(found \[\]\); regions: .*\(found 3\)",
        ],
        6,
    ),
    ("csv_table", "train.csv", {(1, 1): "x", (2, 5): "", (2, 6): ""}, ["line 2: x,y,", "line 3: no text"], 4),
    (
        "openimages",
        "train-annotations-bbox.csv",
        {(1, 1): "/m/3", (2, 2): "nan"},
        [r"line 2: LabelName '/m/3' is not among the 2 classes", r"line 3: XMin: .* finite number"],
        2,
    ),
    (
        "openimages",
        "class-descriptions-boxable.csv",
        {(0, 0): "/m/2"},
        [r"boxable\.csv line 2: class /m/2 is 'Cat', and was 'Dog' before", "LabelName '/m/1' is not among the 1 cl"],
        2,
    ),
]


def said(name: str, folder: Path) -> int:
    """How many captions, boxes, masks, questions and so on are read."""
    records = [record for record, _ in read(name, folder)]
    kinds = ("captions", "regions", "objects", "phrases", "expressions", "questions", "statements")
    return sum(
        len(getattr(one, kind)) + sum(getattr(each, "mask", None) is not None for each in getattr(one, kind))
        for one in records
        for kind in kinds
    )


@pytest.mark.parametrize(("name", "file", "wrong", "messages", "less"), WRONG)
def test_what_is_wrong_is_named_and_hides_nothing_else(tmp_path, pictures, name, file, wrong, messages, less):
    sound, broken = tmp_path / "sound", tmp_path / "broken"
    document = FILES[name][file]
    for at, value in wrong.items():
        document = changed(document, at, "put", value)
    for folder, files in ((sound, {}), (broken, {file: document})):
        folder.mkdir()
        write(folder, pictures, FILES[name] | files)
    with pytest.raises(ValueError, match=str(tmp_path)) as raised:
        list(read(name, broken))
    errors = []
    with listing(errors):
        assert said(name, broken) == said(name, sound) - less
    assert str(raised.value) == str(errors[0])
    assert len(errors) == len(set(map(str, errors))) >= len(messages)
    left = iter(map(str, errors))
    for message in messages:
        assert any(re.search(message, one) for one in left), (message, list(map(str, errors)))
