"""Visual Genome: files of both versions, written as they are published, and broken ones."""

import json
from pathlib import Path

import pytest
from photographs import place

from xvlm.data.readers import visual_genome
from xvlm.data.records import Object, Question, Region

URL = "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg"
IMAGES = [
    {"width": 100, "url": URL, "height": 80, "image_id": 1, "coco_id": None, "flickr_id": None},
    {"width": 100, "url": "", "height": 80, "image_id": 2, "coco_id": 139, "flickr_id": 8024364858},
]
CLOCK = {"synsets": ["clock.n.01"], "h": 40, "object_id": 11, "names": ["clock "], "w": 30, "y": 10, "x": 20}
TREE = {"synsets": [], "h": 90, "object_id": 12, "names": ["", "trees", "tree"], "w": 50, "y": -5, "x": 70}
FLAT = CLOCK | {"object_id": 13, "h": 0}
VERSION_1_2 = {
    "objects": [{"image_id": 1, "objects": [CLOCK | {"merged_object_ids": []}, TREE, FLAT], "image_url": URL}],
    "attributes": [{"image_id": 1, "attributes": [CLOCK | {"attributes": ["green", "", " tall"]}, TREE]}],
    "region_descriptions": [
        {
            "id": 1,
            "regions": [
                {
                    "region_id": 5,
                    "width": 82,
                    "height": 9,
                    "image_id": 1,
                    "phrase": "the clock\n is green",
                    "y": 5,
                    "x": 8,
                },
                {"region_id": 6, "width": 82, "height": 9, "image_id": 1, "phrase": " ", "y": 57, "x": 42},
            ],
        }
    ],
    "question_answers": [
        {"id": 1, "qas": [{"qa_id": 9, "question": "Is it green?", "image_id": 1, "answer": "Yes.", "a_objects": []}]}
    ],
}
VERSION_1_0 = {
    "objects": [{"id": 1, "objects": [_ | {"id": _["object_id"]} for _ in (CLOCK, TREE, FLAT)]}],
    "attributes": [{"id": 1, "attributes": [CLOCK | {"id": 11, "attributes": ["green", "tall"]}]}],
    "region_descriptions": [
        {
            "id": 1,
            "regions": [
                {"id": 5, "width": 82, "height": 9, "image": 1, "phrase": "the clock is green", "y": 5, "x": 8}
            ],
        }
    ],
    "question_answers": [{"id": 1, "qas": [{"id": 9, "question": "Is it green?", "image": 1, "answer": "Yes."}]}],
}
for one in VERSION_1_0["objects"][0]["objects"] + VERSION_1_0["attributes"][0]["attributes"]:
    del one["object_id"]


def write(folder: Path, files: dict, *, version: str = "") -> Path:
    (folder / "image_data.json").write_text(json.dumps(IMAGES))
    for name, content in files.items():
        (folder / f"{name}{version}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(("files", "version"), [(VERSION_1_2, ""), (VERSION_1_2, "_v1_2"), (VERSION_1_0, "_v1")])
@pytest.mark.parametrize("places", [("VG_100K_2", "VG_100K"), ("images/VG_100K", "images/VG_100K_2"), ("images",) * 2])
def test_both_versions_say_the_same(tmp_path, files, version, places):
    place(tmp_path, f"{places[0]}/1.jpg", f"{places[1]}/2.jpg")
    (first, image), (second, _) = visual_genome.read(write(tmp_path, files, version=version), "train")
    assert image == (tmp_path / places[0] / "1.jpg").read_bytes()
    assert (first.id, first.source, first.credit, first.same_as) == ("1", "visual_genome", URL, {})
    assert first.objects == [
        Object(box_xyxy=(20, 10, 50, 50), label="clock", attributes=["green", "tall"]),
        Object(box_xyxy=(70, 0, 100, 80), label="trees"),
    ]
    assert first.regions == [Region(box_xyxy=(8, 5, 90, 14), descriptions=["the clock is green"])]
    assert first.questions == [Question(text="Is it green?", answers={"Yes.": 0.5}, kind="vg", id="9")]
    assert (second.objects, second.same_as) == ([], {"coco": "139", "flickr": "8024364858"})


def test_one_kind_of_annotation_is_enough(tmp_path):
    place(tmp_path, "images/1.jpg", "images/2.jpg")
    write(tmp_path, {"attributes": VERSION_1_2["attributes"]})
    (first, _), _ = visual_genome.read(tmp_path, "train")
    assert [(thing.label, thing.attributes) for thing in first.objects] == [("clock", ["green", "tall"]), ("trees", [])]


def test_what_is_wrong_is_named(tmp_path, caplog):
    with pytest.raises(ValueError, match="split 'val'; Visual Genome is one set, train"):
        list(visual_genome.read(tmp_path, "val"))
    write(tmp_path, {})
    with pytest.raises(FileNotFoundError, match=r"no annotations; expected objects\.json, attributes\.json"):
        list(visual_genome.read(tmp_path, "train"))
    write(tmp_path, VERSION_1_2)
    with pytest.raises(FileNotFoundError, match="no photographs; expected in it a folder VG_100K, VG_100K_2"):
        list(visual_genome.read(tmp_path, "train"))
    place(tmp_path, "VG_100K/1.jpg")
    with pytest.raises(FileNotFoundError, match=r"2\.jpg: no such photograph, but image_data\.json lists 2"):
        list(visual_genome.read(tmp_path, "train"))
    assert len(list(visual_genome.read(tmp_path, "train", allow_missing=True))) == 1
    assert "1 of 2 photographs are absent: 2.jpg" in caplog.text
    place(tmp_path, "VG_100K/1.jpg", size=(80, 100))
    with pytest.raises(ValueError, match=r"1\.jpg: the image is 80x100, its boxes are in pixels of 100x80"):
        list(visual_genome.read(tmp_path, "train"))
    write(tmp_path, {"objects": [{"image_id": 1, "objects": [CLOCK | {"x": "left"}]}]})
    with pytest.raises(ValueError, match=r"objects\.json: 0\.objects\.0\.x: .* \(found 'left'\)"):
        list(visual_genome.read(tmp_path, "train"))


def test_nothing_is_lost_to_an_id_that_occurs_twice_or_an_image_that_is_not_listed(tmp_path, caplog):
    place(tmp_path, "images/1.jpg", "images/2.jpg")
    objects = [CLOCK, TREE | {"object_id": CLOCK["object_id"]}]
    write(tmp_path, {"objects": [{"image_id": 1, "objects": objects}, {"image_id": 7, "objects": [CLOCK]}]})
    (first, _), _ = visual_genome.read(tmp_path, "train")
    assert [thing.label for thing in first.objects] == ["clock", "trees"]
    assert "image_data.json does not list 1 images that have annotations: 7" in caplog.text
    write(tmp_path, {"objects": [{"image_id": 1, "objects": [CLOCK]}, {"image_id": 1, "objects": [TREE]}]})
    with pytest.raises(ValueError, match=r"objects\.json: 1: image_id 1 is that of another entry before it"):
        list(visual_genome.read(tmp_path, "train"))
