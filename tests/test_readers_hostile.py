"""Whatever a file of annotations holds: records, or one clear error that names it; a check goes on behind it."""

import json
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
