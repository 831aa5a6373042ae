"""ODVG and GRIT: captions with boxed phrases, files as they are documented, broken ones, and hostile archives."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from photographs import jpeg, place

from xvlm.data.readers import grit, odvg
from xvlm.data.readers.entries import listing
from xvlm.data.records import Object, Phrase, Region

CAPTION = "Two surfers walking down the shore. sand on the beach."
GROUNDING = {
    "filename": "2405116.jpg",
    "height": 80,
    "width": 100,
    "grounding": {
        "caption": CAPTION,
        "regions": [
            {"bbox": [20, 15, 28, 24], "phrase": "Two surfers", "tokens_positive": [[4, 11], [0, 3]]},
            {
                "bbox": [[30, 33, 44, 34], [90, 70, 120, 90]],
                "phrase": ["sand", "beach"],
                "tokens_positive": [[36, 40], [48, 53]],
            },
            {"bbox": [30, 33, 30, 34], "phrase": "no area"},
            {"bbox": [0, 0, 9, 9], "phrase": "shore"},
        ],
    },
}
DETECTION = {
    "filename": "000000391895.jpg",
    "height": 80,
    "width": 100,
    "detection": {
        "instances": [
            {"bbox": [35.5, 14, 47, 35], "label": 3, "category": "motorcycle"},
            {"bbox": [0, 0, 9, 9], "label": 0},
        ]
    },
}


def write(folder: Path, *lines: dict, name: str = "train.jsonl") -> Path:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("name", ["train.jsonl", "flickr_train_vg.json", "annotations/o365_train_odvg.jsonl"])
@pytest.mark.parametrize("image", ["train", "images/train", "images", "."])
def test_odvg(tmp_path, name, image):
    place(tmp_path / image, "2405116.jpg", "000000391895.jpg")
    write(tmp_path, GROUNDING, DETECTION, {**GROUNDING, "grounding": {"caption": "Sea.", "regions": []}}, name=name)
    (tmp_path / name).with_name("label_map.json").write_text('{"0": "person"}')
    (grounded, _), (detected, _) = odvg.read(tmp_path, "train")
    assert (grounded.id, grounded.source, grounded.original_id) == ("2405116", tmp_path.name, "2405116.jpg")
    assert grounded.captions == [CAPTION, "Sea."]
    sand = [(30.0, 33.0, 44.0, 34.0), (90.0, 70.0, 100.0, 80.0)]
    assert grounded.regions == [
        Region(box_xyxy=(20, 15, 28, 24), descriptions=["Two surfers"]),
        Region(box_xyxy=(30, 33, 100, 80), descriptions=["sand beach"]),
        Region(box_xyxy=(0, 0, 9, 9), descriptions=["shore"]),
    ]
    assert grounded.phrases == [
        Phrase(caption=0, start=0, end=11, boxes_xyxy=[(20, 15, 28, 24)]),
        Phrase(caption=0, start=36, end=40, boxes_xyxy=sand),
        Phrase(caption=0, start=48, end=53, boxes_xyxy=sand),
    ]
    assert detected.objects == [
        Object(box_xyxy=(35.5, 14, 47, 35), label="motorcycle"),
        Object(box_xyxy=(0, 0, 9, 9), label="person"),
    ]


def test_odvg_of_other_names(tmp_path):
    place(tmp_path / "grit", "2405116.jpg")
    write(tmp_path, GROUNDING, name="grit20m_vg.json")
    ((record, _),) = odvg.read(tmp_path, "train", files=[tmp_path / "grit20m_vg.json"], images_at=[tmp_path / "grit"])
    assert record.captions == [CAPTION]


def test_odvg_that_is_wrong(tmp_path, caplog):
    place(tmp_path, "2405116.jpg")
    regions = GROUNDING["grounding"]["regions"]
    for line, message in [
        ({**GROUNDING, "width": 99}, r"2405116\.jpg: the image is 100x80, its boxes are in pixels of 99x80"),
        (
            {**GROUNDING, "grounding": {"caption": "a", "regions": regions[:1]}},
            r"train\.jsonl line 1: phrases\.0: span",
        ),
        ({**GROUNDING, "grounding": {"regions": []}}, r"train\.jsonl line 1: grounding\.caption: Field required"),
        (
            {**GROUNDING, "grounding": {"caption": "a", "regions": [{"bbox": [0, 0, 9, 9], "phrase": " "}]}},
            r"train\.jsonl line 1: grounding\.regions\.0\.phrase is empty",
        ),
        (
            {**DETECTION, "filename": "2405116.jpg"},
            r"train\.jsonl line 1: detection\.instances\.1: no category, and label 0 in no label_map",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            list(odvg.read(write(tmp_path, line), "train"))
    write(tmp_path, GROUNDING, DETECTION)
    assert len(list(odvg.read(tmp_path, "train", allow_missing=True))) == 1
    assert "1 of 2 photographs are absent: 000000391895.jpg" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# GRIT

ENTRY = {
    "key": "000000012",
    "caption": "a wire hanger with a paper cover that reads we heart our customers",
    "url": "https://example.org/a.jpg",
    "status": "success",
    "width": 200,
    "height": 100,
    "noun_chunks": [
        [19, 32, 0.0, 0.5, 0.5, 0.75, 0.96],
        [19, 32, 0.5, 0.5, 1.2, 0.75, 0.9],
        [0, 13, 0.1, 0.0, 0.9, 0.5, 0.8],
        [0, 13, 0.1, 0.2, 0.1, 0.5, 0.8],
    ],
    "ref_exps": [[19, 66, 0.0, 0.5, 0.5, 0.75, 0.96]],
}


def archive(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("unpacked", [True, False])
def test_grit(tmp_path, unpacked):
    members = {"000000012.json": json.dumps(ENTRY).encode(), "000000012.txt": b"a", "000000012.jpg": jpeg(200, 100)}
    if unpacked:
        (tmp_path / "00000").mkdir()
        for name, content in members.items():
            (tmp_path / "00000" / name).write_bytes(content)
    else:
        archive(tmp_path / "00000.tar", members)
    ((record, image),) = grit.read(tmp_path, "train")
    assert image == jpeg(200, 100)
    assert (record.id, record.source, record.credit) == ("000000012", "grit", "https://example.org/a.jpg")
    assert record.captions == [ENTRY["caption"]]
    said = [(record.captions[0][phrase.start : phrase.end], phrase.boxes_xyxy) for phrase in record.phrases]
    assert said == [
        ("a paper cover", [(0, 50, 100, 75), (100, 50, 200, 75)]),
        ("a wire hanger", [(20, 0, 180, 50)]),
    ]
    (expression,) = record.expressions
    assert expression.text == "a paper cover that reads we heart our customers"
    assert (expression.box_xyxy, expression.boxes_xyxy) == ((0, 50, 100, 75), [])


@pytest.mark.parametrize("unpacked", [True, False])
@pytest.mark.parametrize("ending", ["webp", "png", "jpeg"])
def test_grit_in_other_formats(tmp_path, unpacked, ending):
    document, image = json.dumps(ENTRY).encode(), jpeg(200, 100)
    archive(tmp_path / "0.tar", {"000000012.json": document, f"000000012.{ending}": image})
    if unpacked:
        (tmp_path / "0").mkdir()
        (tmp_path / "0.tar").unlink()
        (tmp_path / "0/000000012.json").write_bytes(document)
        (tmp_path / f"0/000000012.{ending}").write_bytes(image)
    ((_, found),) = grit.read(tmp_path, "train")
    assert found == image


def test_grit_without_an_image(tmp_path, caplog):
    archive(tmp_path / "0.tar", {"000000012.json": json.dumps(ENTRY).encode()})
    with pytest.raises(FileNotFoundError, match=r"0\.tar/000000012\.jpg: no such photograph"):
        list(grit.read(tmp_path, "train"))
    absent: list[str] = []
    assert list(grit.read(tmp_path, "train", allow_missing=absent)) == []
    assert absent == ["000000012.jpg"]
    assert "1 of 1 photographs are absent" in caplog.text


def test_grit_that_is_broken_or_hostile(tmp_path, monkeypatch):
    path = tmp_path / "0.tar"
    document, image = json.dumps(ENTRY).encode(), jpeg(200, 100)
    archive(path, {"../../0.json": document, "../../0.jpg": image})
    assert len(list(grit.read(tmp_path, "train"))) == 1  # read by name, never unpacked
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["0.tar"]
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("0.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert list(grit.read(tmp_path, "train")) == []
    monkeypatch.setattr(grit, "LARGEST", 1000)
    archive(path, {"0.json": b" " * 1001})
    with pytest.raises(ValueError, match=r"0\.tar/0\.json: 1001 bytes; expected an image or its description"):
        list(grit.read(tmp_path, "train"))
    monkeypatch.undo()
    archive(path, {"0.json": json.dumps(ENTRY | {"noun_chunks": [[0, 1, 2]]}).encode(), "0.jpg": image})
    with pytest.raises(ValueError, match=r"0\.tar/0\.json: noun_chunks\.0"):
        list(grit.read(tmp_path, "train"))
    archive(path, {"0.json": document, "0.jpg": image})
    path.write_bytes(path.read_bytes()[:1700])
    with pytest.raises(ValueError, match=r"0\.tar: not readable as a tar file"):
        list(grit.read(tmp_path, "train"))


def test_a_tar_that_was_cut_between_its_files_is_named_and_the_next_is_checked(tmp_path):
    members = {"0.json": json.dumps(ENTRY).encode(), "0.jpg": jpeg(200, 100)}
    for name, key in (("0.tar", "a"), ("1.tar", "b")):
        archive(tmp_path / name, members | {"0.json": json.dumps(ENTRY | {"key": key}).encode()})
    whole = (tmp_path / "0.tar").read_bytes()
    with tarfile.open(tmp_path / "0.tar") as tar:
        (tmp_path / "0.tar").write_bytes(whole[: tar.getmember("0.jpg").offset])
    errors = []
    with listing(errors):
        assert [record.id for record, _ in grit.read(tmp_path, "train", allow_missing=True)] == ["b"]
    assert [str(error) for error in errors] == [f"{tmp_path / '0.tar'}: the tar file ends early, after 1 files"]
