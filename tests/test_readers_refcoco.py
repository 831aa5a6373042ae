"""RefCOCO and its kin: pickles as Python 2 wrote them, JSON forms that circulate, gRefCOCO, and hostile pickles."""

import json
import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from photographs import place

from xvlm.data.readers import refcoco, refcoco_json

NAME = "COCO_train2014_000000581857.jpg"


def sentence(number: int, text: str) -> dict:
    return {"tokens": text.split(), "raw": text.title(), "sent_id": number, "sent": text}


def ref(number: int, ann_id, split: str, *sentences: dict) -> dict:
    fields = {
        "sent_ids": [one["sent_id"] for one in sentences],
        "file_name": f"COCO_train2014_000000581857_{number}.jpg",
    }
    named = {"ann_id": ann_id, "ref_id": number, "image_id": 581857, "split": split, "category_id": 1}
    return fields | named | {"sentences": list(sentences)}


REFS = [
    ref(0, 100, "train", sentence(0, "the lady with the blue shirt"), sentence(1, "lady")),
    ref(1, 101, "testA", sentence(2, "left man")),
    ref(2, 101, "train", sentence(3, "man in grün")),
    ref(3, 100, "val", sentence(4, "woman")),
]
INSTANCES = {
    "info": {},
    "images": [{"license": 1, "file_name": NAME, "height": 80, "width": 100, "id": 581857}],
    "annotations": [
        {
            "segmentation": [[10, 20, 40, 20, 40, 60, 10, 60]],
            "area": 1200.0,
            "iscrowd": 0,
            "image_id": 581857,
            "bbox": [10, 20, 30, 40],
            "category_id": 1,
            "id": 100,
        },
        {
            "segmentation": [{"size": [80, 100], "counts": [4800, 1600, 1600]}],
            "image_id": 581857,
            "bbox": [60.0, 0.0, 20.5, 80.2],
            "category_id": 1,
            "id": 101,
        },
    ],
    "categories": [{"supercategory": "person", "id": 1, "name": "person"}],
}


def python_2(value) -> bytes:
    """Opcodes as Python 2 wrote them with protocol 2: its strings are bytes."""
    if isinstance(value, dict):
        return b"}(" + b"".join(python_2(part) for pair in value.items() for part in pair) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(python_2, value)) + b"e"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    return b"U" + bytes([len(value.encode())]) + value.encode()


def write(folder: Path, refs: list[dict], *, by: str = "unc", image: str = "../images/mscoco/images/train2014") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"refs({by}).p").write_bytes(b"\x80\x02" + python_2(refs) + b".")
    (folder / "instances.json").write_text(json.dumps(INSTANCES))
    place(folder.resolve(), f"{image}/{NAME}")
    return folder


@pytest.mark.parametrize("image", ["../images/mscoco/images/train2014", "../train2014", "images", "train2014"])
def test_refs_of_a_split_by_photograph(tmp_path, image):
    folder = write(tmp_path / "refcoco+", REFS, image=image)
    ((record, data),) = refcoco.read(folder, "train")
    assert data == (folder.resolve() / image / NAME).read_bytes()
    assert (record.id, record.source, record.split, record.tags) == ("581857", "refcoco+", "train", [])
    assert record.same_as == {"coco": "581857"}
    assert [(said.id, said.text, said.box_xyxy, said.boxes_xyxy) for said in record.expressions] == [
        ("0", "the lady with the blue shirt", (10, 20, 40, 60), []),
        ("1", "lady", (10, 20, 40, 60), []),
        ("3", "man in grün", (60, 0, 80.5, 80), []),
    ]
    ((record, _),) = refcoco.read(folder, "testA")
    assert (record.split, record.tags, record.expressions[0].text) == ("test", ["testA"], "left man")


def test_masks_of_polygons_and_of_several_run_lengths(tmp_path):
    from pycocotools import mask as coco_mask

    ((record, _),) = refcoco.read(write(tmp_path / "refclef", REFS), "train")
    lady, _, man = (coco_mask.decode(said.mask.model_dump()) for said in record.expressions)
    expected = np.zeros((80, 100), dtype=np.uint8)
    expected[20:60, 10:40] = 1
    np.testing.assert_array_equal(lady, expected)
    expected[:] = 0
    expected[:, 60:80] = 1
    np.testing.assert_array_equal(man, expected)
    ((record, _),) = refcoco.read(tmp_path / "refclef", "train", masks=False)
    assert [said.mask for said in record.expressions] == [None] * 3


def test_a_split_says_which_of_several_refs(tmp_path):
    write(tmp_path / "refcocog", REFS, by="google")
    folder = write(tmp_path / "refcocog", REFS[3:], by="umd")
    with pytest.raises(ValueError, match=r"split 'val'; expected one of val_google, val_umd"):
        list(refcoco.read(folder, "val"))
    assert len(list(refcoco.read(folder, "val_umd"))) == 1
    with pytest.raises(ValueError, match=r"refs\(umd\)\.p: no expression of split 'train'; it has val$"):
        list(refcoco.read(folder, "train_umd"))


def test_grefcoco_with_several_targets_and_with_none(tmp_path):
    from pycocotools import mask as coco_mask

    folder = write(tmp_path / "grefcoco", REFS)
    (folder / "refs(unc).p").unlink()
    both = ref(7, [100, 101], "val", sentence(70, "both people") | {"exist": True}) | {"no_target": False}
    none = ref(8, [-1], "val", sentence(80, "the cat")) | {"no_target": True, "category_id": [-1]}
    (folder / "grefs(unc).json").write_text(json.dumps([both, none]))
    ((record, _),) = refcoco.read(folder, "val")
    people, cat = record.expressions
    assert people.boxes_xyxy == [(10, 20, 40, 60), (60, 0, 80.5, 80)]
    assert people.box_xyxy == (10, 0, 80.5, 80)
    assert coco_mask.area(people.mask.model_dump()) == 30 * 40 + 20 * 80
    assert (cat.text, cat.box_xyxy, cat.boxes_xyxy, cat.mask) == ("the cat", None, [], None)


@pytest.mark.parametrize("listed", ["38/images/38097.jpg", "38097.jpg"])
@pytest.mark.parametrize("image", ["../images/saiapr_tc-12/38/images/38097.jpg", "saiapr_tc-12/38097.jpg"])
def test_referit(tmp_path, listed, image):
    photograph = {"file_name": listed, "height": 80, "width": 100, "id": 38097}
    runs = {"size": [80, 100], "counts": [4800, 1600, 1600]}
    tower = {"image_id": 38097, "id": 7, "category_id": 2, "bbox": [60, 0, 20, 80], "segmentation": [runs]}
    instances = {"images": [photograph], "annotations": [tower], "categories": [{"id": 2, "name": "tower"}]}
    folder = tmp_path / "refclef"
    place(folder, image)
    (folder / "instances.json").write_text(json.dumps(instances))
    for by, part in (("unc", "testC"), ("berkeley", "test")):
        said = ref(3, 7, part, sentence(9, f"tower by {by}")) | {"image_id": 38097, "file_name": "38097_7.jpg"}
        (folder / f"refs({by}).p").write_bytes(b"\x80\x02" + python_2([said]) + b".")
    ((record, _),) = refcoco.read(folder, "testC_unc")
    assert (record.id, record.source, record.split, record.tags) == ("38097", "refclef", "test", ["testC"])
    assert (record.expressions[0].text, record.expressions[0].box_xyxy) == ("tower by unc", (60, 0, 80, 80))
    assert record.expressions[0].mask is not None
    ((record, _),) = refcoco.read(folder, "test_berkeley")
    assert (record.tags, record.expressions[0].text, record.same_as) == ([], "tower by berkeley", {})


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_runs_nothing(tmp_path, protocol):
    folder = write(tmp_path / "refcoco", REFS)
    (folder / "refs(unc).p").write_bytes(pickle.dumps([Hostile(tmp_path / "ran")], protocol=protocol))
    with pytest.raises(
        ValueError, match=r"refs\(unc\)\.p: not readable as a pickle of plain values: it wants \w+\.mkdir"
    ):
        list(refcoco.read(folder, "train"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_any_protocol_with_plain_values_are_read(tmp_path, protocol):
    folder = write(tmp_path / "refcoco", REFS)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(REFS, protocol=protocol))
    assert len(next(refcoco.read(folder, "train"))[0].expressions) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"]r\xff\xff\xff\x00", "no expression of split 'train'"),  # the sixteen millionth value to remember
        (b"\x96" + struct.pack("<Q", 1 << 28), "not readable as a pickle of plain values"),  # so many bytes, of none
        (b"]q\x00" + b"(h\x00h\x00lq\x00" * 30, r"refs\(unc\)\.p: 0: "),  # a list twice in a list, and so on
    ],
)
def test_a_pickle_takes_no_more_than_it_holds(tmp_path, content, message):
    folder = write(tmp_path / "refcoco", REFS)
    (folder / "refs(unc).p").write_bytes(b"\x80\x04" + content + b".")
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        list(refcoco.read(folder, "train"))
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_what_is_wrong_is_named(tmp_path, caplog):
    folder = write(tmp_path / "refcoco", REFS)
    for refs, message in [
        ([ref(0, 5, "train", sentence(0, "a"))], r"refs\(unc\)\.p: ref 0: ann_id 5 is not in .*instances\.json"),
        ([REFS[0] | {"image_id": 5}], r"instances\.json: no image 5, which refs\(unc\)\.p refers to"),
        ([REFS[0] | {"sentences": [{"sent": "a"}]}], r"refs\(unc\)\.p: 0\.sentences\.0\.sent_id: Field required"),
    ]:
        (folder / "refs(unc).p").write_bytes(pickle.dumps(refs))
        with pytest.raises(ValueError, match=message):
            list(refcoco.read(folder, "train"))
    (folder / "refs(unc).p").write_bytes(pickle.dumps(REFS)[:-30])
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p: not readable as a pickle"):
        list(refcoco.read(folder, "train"))
    (folder / "refs(unc).p").write_bytes(pickle.dumps(REFS))
    (tmp_path / f"images/mscoco/images/train2014/{NAME}").unlink()
    with pytest.raises(FileNotFoundError, match=r"581857\.jpg: no such photograph, but refs\(unc\)\.p refers to it"):
        list(refcoco.read(folder, "train"))
    assert list(refcoco.read(folder, "train", allow_missing=True)) == []
    assert "1 of 1 photographs are absent" in caplog.text
    (folder / "instances.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"instances\.json: no such file"):
        list(refcoco.read(folder, "train"))


# ---------------------------------------------------------------------------------------------------------------------
# Other JSON forms

MDETR = {
    "info": [],
    "licenses": [],
    "images": [
        {
            "file_name": NAME,
            "height": 80,
            "width": 100,
            "id": number,
            "original_id": 581857,
            "caption": caption,
            "dataset_name": "refcoco",
            "tokens_negative": [[0, len(caption)]],
        }
        for number, caption in enumerate(["the lady", "left man"])
    ],
    "annotations": [
        {"area": 1.0, "iscrowd": 0, "image_id": 0, "category_id": 1, "id": 0, "bbox": [10, 20, 30, 40]},
        {"area": 1.0, "iscrowd": 0, "image_id": 1, "category_id": 1, "id": 1, "bbox": [60, 0, 20, 80]},
    ],
    "categories": [],
}
SEQTR = {
    "train": [],
    "testA": [
        {
            "image_id": 581857,
            "bbox": [10, 20, 30, 40],
            "expressions": ["the lady"],
            "width": 100,
            "height": 80,
            "mask": [],
        },
        {"image_id": 581857, "bbox": [60, 0, 20, 80], "expressions": ["left man"], "width": 100, "height": 80},
    ],
}


@pytest.mark.parametrize(("name", "content"), [("finetune_refcoco_testA.json", MDETR), ("instances.json", SEQTR)])
def test_json_forms_say_the_same(tmp_path, name, content):
    place(tmp_path, f"images/train2014/{NAME}")
    (tmp_path / "refcoco").mkdir()
    (tmp_path / "refcoco" / name).write_text(json.dumps(content))
    ((record, _),) = refcoco_json.read(tmp_path / "refcoco", "testA")
    assert (record.id, record.source, record.split, record.tags) == ("581857", "refcoco", "test", ["testA"])
    assert record.same_as == {"coco": "581857"}
    assert [(said.text, said.box_xyxy) for said in record.expressions] == [
        ("the lady", (10, 20, 40, 60)),
        ("left man", (60, 0, 80, 80)),
    ]


def test_json_forms_that_are_wrong(tmp_path):
    place(tmp_path, f"images/{NAME}")
    for name, content, message in [
        ("instances.json", {"train": []}, r"instances\.json: no split 'testA'; it has train"),
        (
            "instances.json",
            {"testA": [SEQTR["testA"][0] | {"bbox": [60, 20, 90, 70]}]},
            r"box \(60, 20, 150, 90\) as left",
        ),
        (
            "finetune_x_testA.json",
            MDETR | {"annotations": []},
            "image 0: no annotation has a box for its caption 'the lad",
        ),
    ]:
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            list(refcoco_json.read(tmp_path, "testA"))
