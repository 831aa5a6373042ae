"""COCO: files written as they are published, broken ones, and real ones if at hand."""

import json
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from photographs import jpeg, real
from PIL import Image

from xvlm.data.readers import coco

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
    with pytest.raises(ValueError, match=r"139\.jpg: image cannot be decoded"):
        list(coco.read(folder, "train"))
    (folder / "annotations/instances_train.json").write_text("{")
    with pytest.raises(ValueError, match=r"instances_train\.json: .*Invalid JSON"):
        list(coco.read(folder, "train"))


def test_coco_that_is_absent(tmp_path, caplog):
    with pytest.raises(ValueError, match="split 'dev'"):
        list(coco.read(tmp_path, "dev"))
    with pytest.raises(FileNotFoundError, match=r"neither annotations/captions_train\.json nor .*; found none$"):
        list(coco.read(tmp_path, "train"))
    two = {**CAPTIONS, "images": [{**PHOTOGRAPH, "id": 140, "file_name": "140.jpg"}, PHOTOGRAPH]}
    folder = write_coco(tmp_path, "train", "images", captions=two)
    with pytest.raises(FileNotFoundError, match=r"images/140\.jpg: no such photograph, but the annotations of train"):
        list(coco.read(folder, "train"))
    assert [record.id for record, _ in coco.read(folder, "train", allow_missing=True)] == ["139"]
    assert "1 of 2 photographs are absent: 140.jpg" in caplog.text
    (folder / "images").rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match="no photographs; expected in it a folder images/train, train, images"):
        list(coco.read(folder, "train"))


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
