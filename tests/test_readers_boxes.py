"""Open Images and Objects365: files written as they are published, and broken ones."""

import json

import pytest
from photographs import place

from xvlm.data.readers import objects365, openimages
from xvlm.data.records import Object

HEADING = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
)
ROWS = """000002b66c9c498e,xclick,/m/01g317,1,0.012500,0.195312,0.148438,0.587500,0,1,0,0,0
000002b66c9c498e,xclick,/m/0284d,1,0.5,1.0,0.25,0.75,0,0,1,0,0
000002b66c9c498e,xclick,/m/0284d,1,0.5,1.01,0.25,0.75,0,0,0,0,0
000002b97e5471a0,activemil,/m/01g317,1,0.3,0.3,0.4,0.5,0,0,0,0,0
000002b97e5471a0,activemil,/m/01g317,1,0.25,0.5,0.5,0.75,-1,-1,-1,-1,-1
000002b97e5471a0,xclick,/m/0284d,0,0.25,0.5,0.5,0.75,0,0,0,0,0
"""
ORIGINS = """ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,OriginalSize,Rotation
000002b66c9c498e,train,https://c7.staticflickr.com/6/5079/7306_02f9d3e1f5_o.jpg,x,https://cc/by/2.0/,x,Ada,"a, b",1,0
"""


@pytest.fixture
def open_images(tmp_path):
    (tmp_path / "oidv6-train-annotations-bbox.csv").write_text(f"{HEADING}\n{ROWS}")
    (tmp_path / "class-descriptions-boxable.csv").write_text("/m/01g317,Person\n/m/0284d,Dairy Product\n")
    (tmp_path / "train-images-boxable-with-rotation.csv").write_text(ORIGINS)
    place(tmp_path, "train/000002b66c9c498e.jpg", "train/000002b97e5471a0.jpg", size=(200, 100))
    return tmp_path


def test_open_images_has_boxes_in_pixels_without_groups(open_images):
    (first, image), (second, _) = openimages.read(open_images, "train")
    assert image == (open_images / "train/000002b66c9c498e.jpg").read_bytes()
    assert (first.id, first.source, first.split) == ("000002b66c9c498e", "openimages", "train")
    person, dairy = first.objects
    assert person.label == "Person"
    assert person.box_xyxy == pytest.approx((2.5, 14.8438, 39.0624, 58.75))
    assert dairy == Object(box_xyxy=(100, 25, 200, 75), label="Dairy Product")
    assert (first.licence, first.credit.split()[0], first.same_as) == ("https://cc/by/2.0/", "Ada", {"flickr": "7306"})
    assert second.objects == [Object(box_xyxy=(50, 50, 100, 75), label="Person")]
    assert second.licence == ""


def test_open_images_as_fiftyone_lays_them_out(open_images):
    (open_images / "validation/labels").mkdir(parents=True)
    (open_images / "validation/metadata").mkdir()
    (open_images / "oidv6-train-annotations-bbox.csv").rename(open_images / "validation/labels/detections.csv")
    classes = "LabelName,DisplayName\n" + (open_images / "class-descriptions-boxable.csv").read_text()
    (open_images / "class-descriptions-boxable.csv").unlink()
    (open_images / "validation/metadata/classes.csv").write_text(classes)
    (open_images / "train").rename(open_images / "validation/data")
    (first, _), _ = openimages.read(open_images, "validation")
    assert (first.split, [thing.label for thing in first.objects]) == ("val", ["Person", "Dairy Product"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.012500", "left", r"bbox\.csv line 2: XMin: .* \(found 'left'\)"),
        ("/m/01g317,1,0.01", "/m/x,1,0.01", r"bbox\.csv line 2: LabelName '/m/x' is not among the 2 classes"),
        ("0,1,0,0,0\n", "0,1,0\n", r"bbox\.csv line 2: expected 13 cells, as in the heading, found 11"),
        ("000002b97e5471a0", "a,\n000002b66c9c498e", r"bbox\.csv line 5: expected 13 cells"),
        ("ImageID", "Image", r"bbox\.csv: no column ImageID; found Image,Source"),
        ("XMax,", "Xmax,", r"bbox\.csv line 2: XMax: Field required"),
    ],
)
def test_open_images_that_are_malformed(open_images, old, new, message):
    path = open_images / "oidv6-train-annotations-bbox.csv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        list(openimages.read(open_images, "train"))


def test_open_images_whose_rows_are_not_in_order(open_images):
    path = open_images / "oidv6-train-annotations-bbox.csv"
    path.write_text(path.read_text() + ROWS.splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="rows of 000002b66c9c498e in two places"):
        list(openimages.read(open_images, "train"))


def test_open_images_that_are_absent(open_images, caplog):
    (open_images / "train/000002b66c9c498e.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"98e\.jpg: no such photograph, but oidv6-train-annotations-bbox\.csv"):
        list(openimages.read(open_images, "train"))
    assert len(list(openimages.read(open_images, "train", allow_missing=True))) == 1
    (open_images / "class-descriptions-boxable.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"no class-descriptions-boxable\.csv"):
        list(openimages.read(open_images, "train"))


# ---------------------------------------------------------------------------------------------------------------------
# Objects365

FILE = {
    "images": [
        {"height": 80, "id": 420917, "license": 5, "width": 100, "file_name": "images/v1/patch8/objects365_v1_1.jpg"},
        {"height": 80, "id": 420918, "license": 5, "width": 100, "file_name": "images/v1/patch8/objects365_v1_2.jpg"},
    ],
    "annotations": [
        {
            "id": 1,
            "iscrowd": 0,
            "isfake": 0,
            "area": 12.0,
            "image_id": 420917,
            "bbox": [10.5, 20, 30, 100],
            "category_id": 9,
        },
        {
            "id": 2,
            "iscrowd": 1,
            "isfake": 0,
            "area": 12.0,
            "image_id": 420917,
            "bbox": [0, 0, 10, 10],
            "category_id": 9,
        },
    ],
    "categories": [{"id": 9, "name": "Sneakers"}],
    "licenses": [],
}


@pytest.mark.parametrize("annotations", ["annotations/zhiyuan_objv2_val.json", "val/zhiyuan_objv2_val.json"])
@pytest.mark.parametrize("image", ["images/v1/patch8", "val/patch8", "images/val/patch8", "images/val", "val"])
def test_objects365(tmp_path, annotations, image):
    (tmp_path / annotations).parent.mkdir()
    (tmp_path / annotations).write_text(json.dumps(FILE))
    place(tmp_path, f"{image}/objects365_v1_1.jpg")
    ((record, _),) = objects365.read(tmp_path, "val")  # the second photograph has no objects
    assert (record.id, record.source, record.split) == ("420917", "objects365", "val")
    assert record.original_id == "images/v1/patch8/objects365_v1_1.jpg"
    assert record.objects == [Object(box_xyxy=(10.5, 20, 40.5, 80), label="Sneakers")]


def test_objects365_that_is_absent(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match=r"no zhiyuan_objv2_train\.json or objects365_train\.json"):
        list(objects365.read(tmp_path, "train"))
    (tmp_path / "objects365_train.json").write_text(json.dumps(FILE))
    with pytest.raises(FileNotFoundError, match=r"objects365_v1_1\.jpg: no such photograph"):
        list(objects365.read(tmp_path, "train"))
    assert list(objects365.read(tmp_path, "train", allow_missing=True)) == []
    assert "1 of 1 photographs are absent: images/v1/patch8/objects365_v1_1.jpg" in caplog.text
