"""Readers of public data sets, on files written as they are published, on broken ones, and on real ones if at hand."""

import json
import zipfile
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xvlm.data.readers import coco, flickr30k_entities
from xvlm.data.records import Phrase, Region

REAL = Path(__file__).parents[2] / "shared/data"


def jpeg(width: int, height: int) -> bytes:
    data = BytesIO()
    Image.new("RGB", (width, height), (10, 120, 200)).save(data, format="JPEG")
    return data.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Flickr30k Entities

XML = """<annotation>
	<filename>36979.jpg</filename>
	<size>
		<width>500</width>
		<height>400</height>
		<depth>3</depth>
	</size>
	<object>
		<name>1</name>
		<bndbox>
			<xmin>1</xmin>
			<ymin>1</ymin>
			<xmax>100</xmax>
			<ymax>200</ymax>
		</bndbox>
	</object>
	<object>
		<name>1</name>
		<name>2</name>
		<bndbox>
			<xmin>251</xmin>
			<ymin>101</ymin>
			<xmax>500</xmax>
			<ymax>400</ymax>
		</bndbox>
	</object>
	<object>
		<name>2</name>
		<bndbox>
			<xmin>600</xmin>
			<ymin>101</ymin>
			<xmax>700</xmax>
			<ymax>400</ymax>
		</bndbox>
	</object>
	<object>
		<name>3</name>
		<scene>1</scene>
		<nobndbox>0</nobndbox>
	</object>
</annotation>
"""
SENTENCES = """[/EN#1/people Two men] stand near [/EN#2/vehicles/other a red car] .
[/EN#1/people two men] on [/EN#3/scene the street] .
Nothing is marked here .
[/EN#1/people Men] look at [/EN#0/notvisual the time] .
[/EN#9/other Somebody] waits [/EN#2/vehicles for a car]
"""


@pytest.fixture
def entities(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/36979_0a1b.jpg").write_bytes(jpeg(250, 100))
    (tmp_path / "test.txt").write_text("36979_0a1b\n")
    for kind, ending, text in (("Annotations", "xml", XML), ("Sentences", "txt", SENTENCES)):
        (tmp_path / kind).mkdir()
        (tmp_path / f"{kind}/36979.{ending}").write_text(text)
    return tmp_path


def test_entities_captions_phrases_and_regions(entities):
    ((record, image),) = flickr30k_entities.read(entities, "test")
    assert image == (entities / "images/36979_0a1b.jpg").read_bytes()
    assert (record.id, record.source, record.split) == ("36979_0a1b", "flickr30k_entities", "test")
    assert (record.width, record.height) == (250, 100)
    assert "non-commercial" in record.licence
    assert record.captions == [
        "Two men stand near a red car .",
        "two men on the street .",
        "Nothing is marked here .",
        "Men look at the time .",
        "Somebody waits for a car",
    ]
    # Half as wide and a quarter as high as the annotated photograph; the box of chain 2 outside it is dropped.
    left, right = (0.0, 0.0, 50.0, 50.0), (125.0, 25.0, 250.0, 100.0)
    said = [(record.captions[p.caption][p.start : p.end], p.boxes_xyxy) for p in record.phrases]
    assert said == [
        ("Two men", [left, right]),
        ("a red car", [right]),
        ("two men", [left, right]),
        ("the street", []),
        ("Men", [left, right]),
        ("the time", []),
        ("Somebody", []),
        ("for a car", [right]),
    ]
    assert record.phrases[1] == Phrase(caption=0, start=19, end=28, boxes_xyxy=[right])
    assert record.regions == [
        Region(box_xyxy=(0.0, 0.0, 250.0, 100.0), descriptions=["Two men", "Men"]),
        Region(box_xyxy=right, descriptions=["a red car", "for a car"]),
    ]


def test_entities_of_the_chain_of_unseen_things_are_no_region(entities):
    (entities / "Annotations/36979.xml").write_text(XML.replace("<name>2</name>", "<name>0</name>"))
    ((record, _),) = flickr30k_entities.read(entities, "test")
    assert [region.descriptions for region in record.regions] == [["Two men", "Men"]]


def test_entities_from_the_archive_are_the_same(entities):
    unpacked = list(flickr30k_entities.read(entities, "test"))
    with zipfile.ZipFile(entities / "annotations.zip", "w") as archive:
        for path in sorted(entities.glob("[AS]*/*")):
            archive.write(path, path.relative_to(entities))
            path.unlink()
    for folder in ("Annotations", "Sentences"):
        (entities / folder).rmdir()
    assert list(flickr30k_entities.read(entities, "test")) == unpacked
    (entities / "annotations.zip").write_bytes(b"PK no")
    with pytest.raises(ValueError, match=r"annotations\.zip: not a zip archive"):
        list(flickr30k_entities.read(entities, "test"))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("Annotations/36979.xml", "</annotation>", "", r"36979\.xml: not readable as XML: .*line 42"),
        ("Annotations/36979.xml", "<width>500", "<width>wide", r"36979\.xml size: .* <width>, found 'wide'"),
        ("Annotations/36979.xml", "<height>400", "<height>0", r"36979\.xml size: .* above 0, found \[500\.0, 0\.0\]"),
        ("Annotations/36979.xml", "<xmax>500</xmax>", "", r"36979\.xml object 2 bndbox: .* <xmax>, found None"),
        ("Annotations/36979.xml", "<name>3</name>", "", r"36979\.xml object 4: no <name>"),
        ("Sentences/36979.txt", "/scene the street]", "/scene the street", r"36979\.txt line 2: .*\[/EN#3/scene"),
        ("Sentences/36979.txt", "#0/notvisual the", "#0 the", r"36979\.txt line 4: expected .*\[/EN#0 the time\]"),
        ("Sentences/36979.txt", SENTENCES, "\n", r"36979\.txt: no captions"),
        ("images/36979_0a1b.jpg", None, "no picture", r"36979_0a1b\.jpg: not an image"),
    ],
)
def test_entities_that_are_malformed(entities, file, old, new, message):
    path = entities / file
    text = new if old is None else path.read_text().replace(old, new)
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        list(flickr30k_entities.read(entities, "test"))


def test_entities_that_are_absent(entities, tmp_path, caplog):
    with pytest.raises(ValueError, match="split 'dev'; expected train, val or test"):
        list(flickr30k_entities.read(entities, "dev"))
    with pytest.raises(FileNotFoundError, match=r"train\.txt: no such list"):
        list(flickr30k_entities.read(entities, "train"))
    (entities / "test.txt").write_text("777\n36979_0a1b\n")
    with pytest.raises(FileNotFoundError, match=r"777\.jpg: no such photograph, but test\.txt lists 777"):
        list(flickr30k_entities.read(entities, "test"))
    assert len(list(flickr30k_entities.read(entities, "test", allow_missing=True))) == 1
    assert "1 of 2 photographs are absent: 777" in caplog.text
    (entities / "Sentences/36979.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"Sentences/36979\.txt: no such file"):
        list(flickr30k_entities.read(entities, "test", allow_missing=True))
    (entities / "Sentences").rmdir()
    with pytest.raises(FileNotFoundError, match=r"neither annotations\.zip nor the folders"):
        list(flickr30k_entities.read(entities, "test"))
    (entities / "images").rename(entities / "photos")
    with pytest.raises(FileNotFoundError, match="images: no such folder; it should hold the photographs"):
        list(flickr30k_entities.read(entities, "test"))


# ---------------------------------------------------------------------------------------------------------------------
# COCO

LICENCES = [{"id": 4, "name": "Attribution License", "url": "http://creativecommons.org/licenses/by/2.0/"}]
PHOTOGRAPH = {
    "license": 4,
    "file_name": "000000000139.jpg",
    "coco_url": "http://images.cocodataset.org/val2017/000000000139.jpg",
    "height": 80,
    "width": 100,
    "date_captured": "2013-11-21 01:34:01",
    "flickr_url": "http://farm9.staticflickr.com/8035/139.jpg",
    "id": 139,
}
CAPTIONS = {
    "info": {"year": 2017},
    "licenses": LICENCES,
    "images": [PHOTOGRAPH],
    "annotations": [
        {"image_id": 139, "id": 1, "caption": "A dog on a\n sofa. "},
        {"image_id": 139, "id": 2, "caption": "A brown dog."},
    ],
}
ROW_RUNS = [1600, 10, 70, 10, 6310]  # two columns of ten rows, counted down the columns of a 100x80 image


def instance(number: int, bbox: list[float], segmentation, *, crowd: int = 0) -> dict:
    shape = {"segmentation": segmentation, "area": 1.0, "bbox": bbox, "iscrowd": crowd}
    return {"id": number, "image_id": 139, "category_id": 18, **shape}


INSTANCES = {
    "licenses": LICENCES,
    "images": [PHOTOGRAPH],
    "annotations": [
        instance(1, [10, 20, 30, 40], [[70.0, 2, 9, 4], [10, 20, 40, 20, 40, 60, 10, 60]]),
        instance(2, [-5.5, 70, 20, 30.25], []),
        instance(3, [20, 0, 2, 10], {"size": [80, 100], "counts": ROW_RUNS}),
        instance(4, [0, 0, 50, 50], {"size": [80, 100], "counts": [0, 8000]}, crowd=1),
        instance(5, [50, 50, 0, 10], [[50, 50, 50, 60, 50, 55]]),
    ],
    "categories": [{"supercategory": "animal", "id": 18, "name": "dog"}],
}


def write_coco(folder: Path, split: str, place: str, **files: dict) -> Path:
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / place).mkdir(parents=True, exist_ok=True)
    (folder / place / PHOTOGRAPH["file_name"]).write_bytes(jpeg(100, 80))
    for kind, content in files.items():
        (folder / f"annotations/{kind}_{split}.json").write_text(json.dumps(content))
    return folder


def changed(tree: dict, **of_the_second_annotation) -> dict:
    first, second, *others = tree["annotations"]
    return {**tree, "annotations": [first, {**second, **of_the_second_annotation}, *others]}


@pytest.mark.parametrize(
    ("split", "place"), [("val2017", "val2017"), ("val2017", "images/val2017"), ("train", "images"), ("test", "test")]
)
def test_coco_captions_and_objects(tmp_path, split, place):
    folder = write_coco(tmp_path, split, place, captions=CAPTIONS, instances=INSTANCES)
    ((record, image),) = coco.read(folder, split)
    assert image == (folder / place / "000000000139.jpg").read_bytes()
    assert (record.id, record.source, record.split) == ("139", "coco", split.removesuffix("2017"))
    assert (record.width, record.height) == (100, 80)
    assert record.captions == ["A dog on a sofa.", "A brown dog."]
    assert [o.label for o in record.objects] == ["dog"] * 3  # without the crowd and the box without area
    assert [o.box_xyxy for o in record.objects] == [(10, 20, 40, 60), (0, 70, 14.5, 80), (20, 0, 22, 10)]
    assert [o.mask for o in record.objects] == [None] * 3
    assert record.licence == "Attribution License http://creativecommons.org/licenses/by/2.0/"
    assert record.credit == "http://farm9.staticflickr.com/8035/139.jpg"


def test_coco_masks(tmp_path):
    from pycocotools import mask as coco_mask

    folder = write_coco(tmp_path, "train", "images", instances=INSTANCES)
    ((record, _),) = coco.read(folder, "train", masks=True)
    polygon, none, runs = (o.mask for o in record.objects)
    assert none is None
    expected = np.zeros((80, 100), dtype=np.uint8)
    expected[20:60, 10:40] = 1
    np.testing.assert_array_equal(coco_mask.decode(polygon.model_dump()), expected)
    expected[:] = 0
    expected[:10, 20:22] = 1
    np.testing.assert_array_equal(coco_mask.decode(runs.model_dump()), expected)
    packed = changed(INSTANCES, segmentation={"size": [80, 100], "counts": runs.counts})
    ((record, _),) = coco.read(write_coco(tmp_path, "train", "images", instances=packed), "train", masks=True)
    assert record.objects[1].mask == runs


def test_coco_with_captions_or_boxes_only(tmp_path):
    folder = write_coco(tmp_path, "train", "images", captions=CAPTIONS)
    (folder / "images/000000000139.jpg").write_bytes(jpeg(50, 50))  # no boxes, so any size will do
    ((record, _),) = coco.read(folder, "train")
    assert (len(record.captions), len(record.objects), record.width) == (2, 0, 50)
    with pytest.raises(FileNotFoundError, match=r"instances_train\.json: no such file; without it train has captions"):
        list(coco.read(folder, "train", require_boxes=True))
    folder = write_coco(tmp_path, "val", "images", instances=INSTANCES)
    ((record, _),) = coco.read(folder, "val", require_boxes=True)
    assert (len(record.captions), len(record.objects)) == (0, 3)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"captions": changed(CAPTIONS, image_id=7)}, "captions_train.json: annotation 2: image_id 7 is not among"),
        ({"captions": changed(CAPTIONS, caption=" \n")}, "captions_train.json: annotation 2: caption is empty"),
        ({"captions": changed(CAPTIONS, caption=3)}, r"captions_train.json: annotations\.1\.caption: .*\(found 3\)"),
        ({"captions": {"images": []}}, "captions_train.json: annotations: Field required"),
        ({"instances": changed(INSTANCES, image_id=7)}, "instances_train.json: annotation 2: image_id 7 is not among"),
        (
            {"instances": changed(INSTANCES, category_id=91)},
            "annotation 2: category_id 91 is not among .* 1 categories",
        ),
        ({"instances": changed(INSTANCES, bbox=[1, 2, 3])}, r"instances_train.json: annotations\.1\.bbox"),
        (
            {"instances": changed(INSTANCES, segmentation={"size": [8, 9], "counts": [72]})},
            "annotation 2: segmentation is of an image of 9x8, the image is 100x80",
        ),
    ],
)
def test_coco_that_is_malformed(tmp_path, files, message):
    folder = write_coco(tmp_path, "train", "images", **files)
    with pytest.raises(ValueError, match=message):
        list(coco.read(folder, "train", masks=True))


def test_coco_that_is_not_json_or_not_an_image(tmp_path):
    folder = write_coco(tmp_path, "train", "images", instances=INSTANCES)
    (folder / "images/000000000139.jpg").write_bytes(jpeg(50, 40))
    with pytest.raises(ValueError, match=r"139\.jpg: the image is 50x40, its boxes are in pixels of 100x80"):
        list(coco.read(folder, "train"))
    (folder / "images/000000000139.jpg").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"139\.jpg: not an image"):
        list(coco.read(folder, "train"))
    (folder / "annotations/instances_train.json").write_text("{")
    with pytest.raises(ValueError, match=r"instances_train\.json: .*Invalid JSON"):
        list(coco.read(folder, "train"))


def test_coco_that_is_absent(tmp_path, caplog):
    with pytest.raises(ValueError, match="split 'dev'"):
        list(coco.read(tmp_path, "dev"))
    with pytest.raises(FileNotFoundError, match=r"neither annotations/captions_train\.json nor"):
        list(coco.read(tmp_path, "train"))
    two = {**CAPTIONS, "images": [{**PHOTOGRAPH, "id": 140, "file_name": "140.jpg"}, PHOTOGRAPH]}
    folder = write_coco(tmp_path, "train", "images", captions=two)
    with pytest.raises(FileNotFoundError, match=r"images/140\.jpg: no such photograph, but the annotations of train"):
        list(coco.read(folder, "train"))
    assert [record.id for record, _ in coco.read(folder, "train", allow_missing=True)] == ["139"]
    assert "1 of 2 photographs are absent: 140.jpg" in caplog.text
    (folder / "images").rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"no photographs; expected a folder .*images/train, "):
        list(coco.read(folder, "train"))


# ---------------------------------------------------------------------------------------------------------------------
# Real files


def real(name: str) -> Path:
    if not (REAL / name).is_dir():
        pytest.skip(f"the real data set is not at {REAL / name}")
    return REAL / name


def test_real_entities():
    records = [record for record, _ in islice(flickr30k_entities.read(real("flickr8k_entities"), "test"), 40)]
    assert all(len(record.captions) == 5 for record in records)
    assert not any("/EN#" in caption or "]" in caption for record in records for caption in record.captions)
    phrases = [phrase for record in records for phrase in record.phrases]
    assert 0.7 < sum(bool(phrase.boxes_xyxy) for phrase in phrases) / len(phrases) < 0.95
    first = records[0]
    assert (first.id, first.width, first.height) == ("1056338697_4f7d7ce270", 224, 224)
    # Annotated as 369, 44, 500, 180 in a photograph of 500x333.
    taxi = [x for x in first.phrases if first.captions[x.caption][x.start : x.end] == "a taxi"]
    assert taxi[0].boxes_xyxy[1] == pytest.approx((368 * 0.448, 43 * 224 / 333, 224, 180 * 224 / 333))
    assert first.regions[0].descriptions == ["A woman", "The woman", "A blond woman"]


def test_real_coco():
    folder = real("coco_open")
    pairs = list(islice(coco.read(folder, "train", masks=True), 40))
    for record, image in pairs:
        assert Image.open(BytesIO(image)).size == (record.width, record.height)
        assert record.licence.startswith(("Attribution", "No known copyright"))
        assert record.credit.startswith("http")
        assert len(record.captions) >= 5
    first = pairs[0][0]
    assert first.id == "183500"
    assert first.objects[0].label == "person"
    assert first.objects[0].box_xyxy == pytest.approx((214.9, 140.7, 228.2, 161.0))
