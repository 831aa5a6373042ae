"""People's own data: COCO JSON, tables and JSON lines, with every mistake in one clear line; real boxes if at hand."""

import csv
import json
from base64 import b64encode
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from photographs import jpeg, place, real
from pycocotools import mask

from xvlm.data.readers import coco_json, csv_table, json_lines
from xvlm.data.readers.entries import listing
from xvlm.data.records import Object, Record, Region, unchecked

# ---------------------------------------------------------------------------------------------------------------------
# COCO JSON

FILE = {
    "images": [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 80}, {"id": "b", "file_name": "sub/b.v2.jpg"}],
    "categories": [{"id": 0, "name": "dog"}],
    "annotations": [
        {"image_id": 1, "category_id": 0, "bbox": [10, 20, 30, 40], "attributes": ["brown"]},
        {"image_id": 1, "category_id": 0, "bbox": [80.5, 0, 20, 10], "attributes": {"occluded": False}},
        {"image_id": 1, "bbox": [10, 20, 30, 40], "caption": " a dog that sleeps"},
        {"image_id": "b", "caption": "a sofa"},
    ],
}


@pytest.mark.parametrize(
    ("file", "image"),
    [
        ("train.json", "."),
        ("instances_train.json", "images"),
        ("annotations/train.json", "images/train"),
        ("annotations/mine_train.json", "train"),
        ("train/_annotations.coco.json", "train"),
    ],
)
def test_coco_json(tmp_path, file, image):
    place(tmp_path / image, "a.jpg", "sub/b.v2.jpg")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(json.dumps(FILE))
    (first, data), (second, _) = coco_json.read(tmp_path, "train")
    assert data == jpeg(100, 80)
    assert (first.id, first.source, first.split, first.original_id) == ("a", tmp_path.name, "train", "1")
    assert first.objects == [
        Object(box_xyxy=(10, 20, 40, 60), label="dog", attributes=["brown"]),
        Object(box_xyxy=(80.5, 0, 100, 10), label="dog"),
    ]
    assert first.regions == [Region(box_xyxy=(10, 20, 40, 60), descriptions=["a dog that sleeps"])]
    assert (second.id, second.captions, second.original_id) == ("sub_b_v2", ["a sofa"], "b")


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ({"image_id": 1, "category_id": 7, "bbox": [0, 0, 9, 9]}, "category_id 7 is not among the file's 1 categories"),
        ({"image_id": "1", "caption": "a"}, r"annotations\.0: image_id '1' is not among the images"),
        ({"image_id": 1, "caption": " "}, r"annotations\.0: caption is empty"),
        (
            {"image_id": 1, "category_id": 0, "bbox": [60, 20, 90, 70]},
            r"annotations\.0: box \(60, 20, 150, 90\) as left",
        ),
        ({"image_id": 1, "category_id": 0, "bbox": [0, 0, 9]}, r"train\.json: annotations\.0\.bbox"),
    ],
)
def test_coco_json_that_is_wrong(tmp_path, annotation, message):
    place(tmp_path, "a.jpg", "sub/b.v2.jpg")
    (tmp_path / "train.json").write_text(json.dumps(FILE | {"annotations": [annotation]}))
    with pytest.raises(ValueError, match=message):
        list(coco_json.read(tmp_path, "train"))


def test_coco_json_of_several_files_is_by_the_name_of_the_image(tmp_path):
    place(tmp_path / "data", "a.jpg", "c.jpg")
    thing = {"image_id": 1, "category_id": 0, "bbox": [10, 20, 30, 40]}
    paths = []
    for task, names, label in (("1", ["a.jpg"], "dog"), ("2", ["c.jpg", "a.jpg"], "cat")):  # ids begin at 1 in each
        paths.append(tmp_path / task / "annotations/instances_default.json")
        paths[-1].parent.mkdir(parents=True)
        images = [{"id": i, "file_name": name} for i, name in enumerate(names, 1)]
        said = [thing | {"image_id": image["id"]} for image in images]
        categories = [{"id": 0, "name": label}]
        paths[-1].write_text(json.dumps({"images": images, "annotations": said, "categories": categories}))
    samples = coco_json.read(tmp_path, "train", files=paths, images_at=[tmp_path / "data"])
    labels = {record.id: [one.label for one in record.objects] for record, _ in samples}
    assert labels == {"a": ["dog", "cat"], "c": ["cat"]}
    with pytest.raises(
        FileNotFoundError, match=r"no train\.json or \*_train\.json or .* in it \(--file names another\)"
    ):
        list(coco_json.read(tmp_path, "train"))
    with pytest.raises(FileNotFoundError, match=r"gone\.json: no such file"):
        list(coco_json.read(tmp_path, "train", files=[*paths, tmp_path / "gone.json"]))


def test_coco_json_keeps_outlines_or_says_that_it_does_not(tmp_path, caplog):
    place(tmp_path, "a.jpg")
    outlined = {"image_id": 1, "category_id": 0, "bbox": [10, 20, 30, 40]}
    outlined |= {"segmentation": [[10, 20, 40, 20, 40, 60, 10, 60]]}
    unboxed = {"image_id": 1, "caption": "a dog", "bbox": [], "segmentation": []}
    (tmp_path / "train.json").write_text(
        json.dumps(FILE | {"images": FILE["images"][:1], "annotations": [outlined, unboxed]})
    )
    ((record, _),) = coco_json.read(tmp_path, "train")
    assert (record.objects[0].mask, record.captions) == (None, ["a dog"])
    assert "1 outlines were left out (--masks or corpus.masks=true keeps them)" in caplog.text
    ((record, _),) = coco_json.read(tmp_path, "train", masks=True)
    assert mask.area(record.objects[0].mask.model_dump()) == 30 * 40


def test_coco_json_without_a_box_has_that_of_its_outline_or_is_left_out(tmp_path, caplog):
    place(tmp_path, "a.jpg")
    thing, polygon = {"image_id": 1, "category_id": 0}, [[10, 20, 40, 20, 40, 60, 10, 60]]
    runs = {"size": [80, 100], "counts": [0, 8000]}
    said = [thing | {"bbox": [], "segmentation": polygon}, thing | {"bbox": None, "segmentation": runs}]
    said += [thing | {"bbox": []}, thing | {"bbox": None, "segmentation": []}, thing, {"image_id": 1, "caption": "a"}]
    (tmp_path / "train.json").write_text(json.dumps(FILE | {"images": FILE["images"][:1], "annotations": said}))
    ((record, _),) = coco_json.read(tmp_path, "train")
    assert [one.box_xyxy for one in record.objects] == [(10, 20, 40, 60), (0, 0, 100, 80)]
    assert record.captions == ["a"]
    assert "annotations left out, without caption, bbox and outline: 3 (xvlm data check --reader lists" in caplog.text
    errors = []
    with unchecked(), listing(errors):
        assert len(list(coco_json.read(tmp_path, "train"))) == 1
    places = [str(error).partition("train.json: ")[2][:14] for error in errors]
    assert places == ["annotations.2:", "annotations.3:", "annotations.4:"]


def test_coco_json_says_how_many_images_have_no_text(tmp_path, caplog):
    place(tmp_path, "a.jpg", "sub/b.v2.jpg")
    for annotations, silent in ((FILE["annotations"], 0), (FILE["annotations"][3:], 1), ([], 2)):
        caplog.clear()
        (tmp_path / "train.json").write_text(json.dumps(FILE | {"annotations": annotations}))
        assert len(list(coco_json.read(tmp_path, "train"))) == 2
        assert (f"{silent} of 2 images have no text" in caplog.text) == bool(silent)


def test_coco_json_of_turned_or_absent_images(tmp_path, caplog):
    (tmp_path / "train.json").write_text(json.dumps(FILE))
    place(tmp_path, "a.jpg", size=(80, 100))
    with pytest.raises(ValueError, match=r"a\.jpg: the image is 80x100, its boxes are in pixels of 100x80"):
        list(coco_json.read(tmp_path, "train"))
    place(tmp_path, "a.jpg")
    with pytest.raises(
        FileNotFoundError,
        match=r"sub/b\.v2\.jpg: no such photograph, .*train\.json: image 'b' lists it \(--allow-missing or ",
    ):
        list(coco_json.read(tmp_path, "train"))
    assert len(list(coco_json.read(tmp_path, "train", allow_missing=True))) == 1
    assert "1 of 2 photographs are absent: sub/b.v2.jpg" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def table(folder: Path, text: str, **options) -> list[Record]:
    place(folder, "a.jpg", "images/b.jpg")
    (folder / "train.csv").write_text(text, encoding="utf-8")
    return [record for record, _ in csv_table.read(folder, "train", **options)]


@pytest.mark.parametrize(
    ("heading", "box"),
    [
        ("image,left,top,right,bottom,text", "10,20,40,60"),
        ("image,xmin,ymin,xmax,ymax,text", "10,20,40,60"),
        ("\ufeffimage, x, y, width, height, text", "10,20,30,40.0"),
    ],
)
def test_columns_of_a_table_decide_what_the_box_is(tmp_path, heading, box):
    first, second = table(tmp_path, f'{heading}\na.jpg,{box},"a dog, asleep"\nb.jpg,{box},x\na.jpg,,,,,a größer sofa\n')
    assert (first.id, first.source, first.captions) == ("a", tmp_path.name, ["a größer sofa"])
    assert first.regions == [Region(box_xyxy=(10, 20, 40, 60), descriptions=["a dog, asleep"])]
    assert (second.id, second.original_id, len(second.regions)) == ("b", "b.jpg", 1)


def test_a_table_of_labels_attributes_and_captions(tmp_path):
    (record,) = table(
        tmp_path,
        "label,attributes,caption,image,left,top,right,bottom\n"
        "dog,brown; small ,a dog on a sofa,a.jpg,10,20,40,60\nsofa,,a dog on a sofa,a.jpg,-1,0,100,80\n",
    )
    assert record.captions == ["a dog on a sofa"]
    assert record.objects == [
        Object(box_xyxy=(10, 20, 40, 60), label="dog", attributes=["brown", "small"]),
        Object(box_xyxy=(0, 0, 100, 80), label="sofa"),
    ]


def test_a_table_of_captions_needs_no_boxes(tmp_path):
    (record,) = table(tmp_path, "image,caption\na.jpg,one\na.jpg,two\n")
    assert record.captions == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"train\.csv: the file is empty$"),
        ("\n", r"train\.csv: the file is empty$"),
        ("split\n", r"no image; no text; expected image, a box as one of left,top,right,bottom or xmin"),
        ("file,text\na.jpg,a\n", r"columns: unknown file; no image; expected .*; found file,text$"),
        (
            "image,left,top,width,height,text\n",
            r"columns: unknown height, width; no right, bottom; expected image, a box",
        ),
        ("image,leftt,top,right,bottom,text\n", r"columns: unknown leftt; no left; expected"),
        ("image\n", r"columns: one only, so no commas between them; "),
        ("image;left;top;right;bottom;text\n", r"train\.csv: separated by ';'; save it as CSV with commas$"),
        ("image\ttext\n", r"train\.csv: separated by tabs; save it as CSV with commas$"),
        ('{"images": [],"a": 1}', r"train\.csv: this looks like JSON, not like a table; for the reader coco_json or"),
        (f"image,{'x' * 999}\n", r"columns: unknown x{200}; no text; .*; found image,x{194}$"),
        ("image,left,top,right,bottom,x,y,width,height,text\n", r"columns: unknown height, width, x, y; expected"),
        ("image,text,text\n", r"columns: several of text; expected"),
        ("image,label\n", r"columns: label without a box; expected"),
        ("image,left,top,right,bottom\n", r"columns: no text; expected"),
        ("image,text\na.jpg\n", r"train\.csv line 2: expected 2 cells, as in the heading, found 1"),
        ("image,text\na.jpg,a,b\n", r"train\.csv line 2: expected 2 cells, as in the heading, found 3"),
        ("image,text\n,a\n", r"train\.csv line 2: image is empty"),
        ("image,text\na.jpg, \n", r"train\.csv line 2: no text; expected one in text, label, caption"),
        ("image,x,y,width,height,text\na.jpg,1,2,x,4,a\n", r"line 2: x,y,width,height: .* four numbers, found 1,2,x,4"),
        ("image,x,y,width,height,text\na.jpg,1,2,,4,a\n", r"line 2: x,y,width,height: .* four numbers, found 1,2,,4"),
        ("image,x,y,width,height,text\na.jpg,nan,2,3,4,a\n", r"line 2: box \(nan, 2, nan, 6\)"),
        ("image,x,y,width,height,text\na.jpg,60,20,90,70,a\n", r"line 2: box \(60, 20, 150, 90\) as left"),
        ("image,left,top,right,bottom,text\na.jpg,60,20,30,40,a\n", r"line 2: box \(60, 20, 30, 40\) as left"),
        ("image,left,top,right,bottom,text\na.jpg,60,20,30,40,a\n", "these look like width and height, of which the"),
        ("image,left,top,right,bottom,text\na.jpg,60,20,50,40,a\n", r"out of it by 2% of its side at most$"),
        ("image,x,y,width,height,label\na.jpg,,,,,dog\n", r"line 2: label 'dog', but x,y,width,height are empty"),
        ("image,left,top,right,bottom,caption\na.jpg,1,2,30,40,a\n", r"line 2: a box, but text and label, which say"),
        ("image,text,attributes\na.jpg,a,brown\n", r"line 2: attributes 'brown', but label is empty or absent"),
        ('image,text\na.jpg,"a\n', r"train\.csv line 2: not readable as CSV: unexpected end"),
    ],
)
def test_tables_that_are_wrong(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as raised:
        table(tmp_path, text)
    assert "\n" not in str(raised.value)


def test_columns_may_be_in_capitals(tmp_path):
    (record,) = table(tmp_path, "Image,X,Y,Width,Height,TEXT\na.jpg,10,20,30,40,a dog\n")
    assert record.regions == [Region(box_xyxy=(10, 20, 40, 60), descriptions=["a dog"])]


def test_a_table_may_hold_all_splits(tmp_path):
    rows = "image,text,split\na.jpg,one,train\nb.jpg,two,val\nb.jpg,three,val\n"
    assert [record.captions for record in table(tmp_path, rows)] == [["one"]]
    ((record, _),) = csv_table.read(tmp_path, "val", files=[tmp_path / "train.csv"])
    assert (record.captions, record.split) == (["two", "three"], "val")
    with pytest.raises(ValueError, match=r"train\.csv: no row of split 'test'; it has train, val"):
        list(csv_table.read(tmp_path, "test", files=[tmp_path / "train.csv"]))
    for row, message in [
        ("a.jpg,four,val", r"line 5: split 'val', but a\.jpg is of 'train' before"),
        ("c.jpg,four,tran", r"line 5: split 'tran'; expected a name that begins with train, val"),
    ]:
        with pytest.raises(ValueError, match=message):
            table(tmp_path, f"{rows}{row}\n")


def test_several_tables_each_with_its_columns(tmp_path):
    place(tmp_path, "a.jpg")
    (tmp_path / "1.csv").write_text("image,x,y,width,height,label\na.jpg,10,20,30,40,dog\n")
    (tmp_path / "2.csv").write_text("image,caption\na.jpg,a dog\n")
    ((record, _),) = csv_table.read(tmp_path, "train", files=[tmp_path / "1.csv", tmp_path / "2.csv"])
    assert (record.objects[0].box_xyxy, record.captions) == ((10, 20, 40, 60), ["a dog"])


def test_a_table_in_another_encoding_or_without_an_image(tmp_path, caplog):
    place(tmp_path, "a.jpg")
    (tmp_path / "train.csv").write_bytes("image,text\na.jpg,größer\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"line 2: expected UTF-8, found the byte 0xf6; save it as CSV UTF-8$"):
        list(csv_table.read(tmp_path, "train"))
    with pytest.raises(FileNotFoundError, match=r"c\.jpg: no such photograph, but .*/train\.csv line 2 lists it"):
        table(tmp_path, "image,text\nc.jpg,a\n")
    assert len(table(tmp_path, "image,text\nc.jpg,a\na.jpg,a\n", allow_missing=True)) == 1
    assert "1 of 2 photographs are absent: c.jpg" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# JSON lines


def lines(folder: Path, *rows: dict, **options) -> list[Record]:
    place(folder, "a.jpg")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [record for record, _ in json_lines.read(folder, "train", **options)]


def test_json_lines_are_records_with_either_box(tmp_path):
    first, second = lines(
        tmp_path,
        {
            "image": "a.jpg",
            "captions": ["a dog on a sofa"],
            "objects": [{"box_xywh": [10, 20, 30, 40], "label": "dog", "attributes": ["brown"]}],
            "regions": [{"box_xyxy": [10, 20, 40, 60], "descriptions": ["a dog that sleeps"]}],
            "expressions": [{"text": "dog", "box_xywh": [10, 20, 30, 40]}, {"text": "cat"}],
            "questions": [{"text": "Is it brown?", "answers": {"yes": 1.0}}],
            "licence": "CC0",
        },
        {"image_base64": b64encode(jpeg(9, 7)).decode(), "id": "x", "source": "web", "split": "test"},
    )
    assert (first.id, first.source, first.split, first.licence) == ("a", tmp_path.name, "train", "CC0")
    assert (first.width, first.height, first.original_id) == (100, 80, "a.jpg")
    assert first.objects == [Object(box_xyxy=(10, 20, 40, 60), label="dog", attributes=["brown"])]
    assert first.regions[0].box_xyxy == first.expressions[0].box_xyxy == (10, 20, 40, 60)
    assert (first.expressions[1].box_xyxy, first.questions[0].answers) == (None, {"yes": 1.0})
    assert (second.id, second.source, second.split, second.width) == ("x", "web", "test", 9)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"captions": ["a"]},
            r"train\.jsonl line 1: expected the path of an image in image, or image_base64 and an id",
        ),
        ({"image_base64": "QUJD"}, "expected the path of an image in image, or image_base64 and an id"),
        ({"image_base64": "QUJD", "id": "x"}, r"train\.jsonl line 1: image cannot be decoded"),
        (
            {"image": "a.jpg", "caption": "a"},
            r"train\.jsonl line 1: caption: records have no such field \(xvlm data",
        ),
        ({"image": "a.jpg", "width": 80, "height": 100}, "the image is 100x80, its boxes are in pixels of 80x100"),
        (
            {
                "image": "a.jpg",
                "objects": [{"box_xywh": [0, 0, 9, 9], "label": "a", "mask": {"size": [9, 9], "counts": "5"}}],
            },
            r"line 1: objects\.0\.mask: expected run lengths of all pixels of \(9, 9\), found counts '5'",
        ),
        ({"image_base64": "!!", "id": "a"}, r"line 1: image_base64: not base64: .*\(found '!!' …\)"),
        ({"image": "a.jpg", "objects": [{"box_xywh": [0, 0, 9, 9]}]}, r"line 1: objects\.0\.label: Field required"),
        ({"image": "a.jpg", "objects": [{"box": [0, 0, 9, 9], "label": "a"}]}, r"line 1: objects\.0\.box_xyxy: Field"),
        (
            {"image": "a.jpg", "objects": [{"box_xywh": [0, 0, 9, 9], "box_xyxy": [0, 0, 9, 9], "label": "a"}]},
            r"line 1: objects\.0: a box as box_xyxy and as box_xywh; expected one of them",
        ),
        (
            {"image": "a.jpg", "objects": [{"box_xywh": [99, 0, 9, 9], "label": "a"}]},
            r"objects\.0: box \(99, 0, 108, 9\)",
        ),
        (
            {"image": "a.jpg", "objects": [{"box_xyxy": [0.1, 0.2, 0.9, 1], "label": "a"}]},
            r"line 1: objects\.0: box \(0\.1, 0\.2, 0\.9, 1\) as left.* look like shares",
        ),
    ],
)
def test_json_lines_that_are_wrong(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        lines(tmp_path, row)


words = st.sampled_from(["", " ", "a", "größer", "../x", "http://[x/a.jpg", "\0", "QUJD", "." * 300])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**70) | st.floats() | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["box_xywh", "label", "text"]), inner),
    max_leaves=6,
)


@settings(deadline=None)
@given(said=st.dictionaries(st.sampled_from([*Record.model_fields, "image", "image_base64"]), json_values, max_size=4))
def test_whatever_a_line_says_it_is_a_record_or_one_clear_error(tmp_path_factory, said):
    folder = tmp_path_factory.mktemp("own")
    try:
        made = lines(folder, {"image": "a.jpg"} | said)
    except (ValueError, FileNotFoundError) as error:
        assert str(folder) in str(error) or "://" in str(error)
    else:
        assert all(Record.model_validate_json(record.model_dump_json()) == record for record in made)


# ---------------------------------------------------------------------------------------------------------------------
# Real boxes


def test_real_boxes_in_each_form_are_the_same(tmp_path):
    folder = real("coco_train2017_mini")
    given = [json.loads(line) for line in (folder / "annotations.jsonl").read_text().splitlines()]
    (tmp_path / "images").symlink_to(folder / "images")
    things = [(one["image"], thing) for one in given for thing in one["objects"]]
    with (tmp_path / "train.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "left", "top", "right", "bottom", "label"])
        rows.writerows([image, *thing["bbox"], thing["label"]] for image, thing in things)
    of_table = {record.original_id: record for record, _ in csv_table.read(tmp_path, "train")}
    labels = sorted({thing["label"] for _, thing in things})
    (tmp_path / "train.json").write_text(
        json.dumps(
            {
                "images": [{"id": one["image_id"], "file_name": one["image"]} for one in given],
                "categories": [{"id": i, "name": label} for i, label in enumerate(labels)],
                "annotations": [
                    {
                        "image_id": one["image_id"],
                        "category_id": labels.index(thing["label"]),
                        "bbox": [left, top, right - left, bottom - top],
                    }
                    for one in given
                    for thing in one["objects"]
                    for left, top, right, bottom in [thing["bbox"]]
                ],
            }
        )
    )
    of_coco = {
        f"images/{record.id.removeprefix('images_')}.jpg": record for record, _ in coco_json.read(tmp_path, "train")
    }
    rows = [
        {"image": one["image"], "objects": [{"box_xyxy": t["bbox"], "label": t["label"]} for t in one["objects"]]}
        for one in given
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    of_lines = {record.original_id: record for record, _ in json_lines.read(tmp_path, "train")}
    assert len(of_lines) == len(given) == 88
    assert sum(len(record.objects) for record in of_lines.values()) == 822
    for name, record in of_lines.items():
        if record.objects:  # a table has no row for an image without boxes
            assert of_table[name].objects == record.objects
        assert [thing.label for thing in of_coco[name].objects] == [thing.label for thing in record.objects]
        for one, other in zip(of_coco[name].objects, record.objects, strict=True):
            assert one.box_xyxy == pytest.approx(other.box_xyxy, abs=1e-9)


def test_a_row_that_is_wrong_hides_no_other_row_of_its_image_from_a_check(tmp_path):
    place(tmp_path, "a.jpg")
    (tmp_path / "train.csv").write_text(
        "image,left,top,right,bottom,text\na.jpg,1,2,x,4,b\na.jpg,1,2,3,4,\na.jpg,,,,,c\n"
    )
    errors = []
    with listing(errors):
        [(record, _)] = csv_table.read(tmp_path, "train")
    assert [str(error).partition("train.csv ")[2][:6] for error in errors] == ["line 2", "line 3"]
    assert record.captions == ["c"] and not record.regions


def test_a_check_reads_on_behind_lines_of_a_table_that_are_no_text(tmp_path):
    place(tmp_path, "a.jpg")
    content = b'image,text\na.jpg,gr\xf6\xdfer\na.jpg,"x" y\na.jpg,"two\nlines"\nb.jpg,c\na.jpg,d\n'
    (tmp_path / "train.csv").write_bytes(content)
    errors = []
    with listing(errors):
        [(record, _)] = csv_table.read(tmp_path, "train")
    assert [str(error).partition("train.csv ")[2][:20] for error in errors] == [
        "line 2: expected UTF",
        "line 3: not readable",
        "line 6 lists it (--a",
    ]
    assert record.captions == ["two\nlines", "d"]
    (tmp_path / "train.csv").write_bytes("image,text\na.jpg,x\n".encode("utf-16"))
    with listing([]), pytest.raises(ValueError, match="line 1: expected UTF-8, found the byte 0xff"):
        list(csv_table.read(tmp_path, "train"))


def test_images_that_are_none_are_named_with_who_lists_them(tmp_path):
    place(tmp_path, "a.jpg")
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    (tmp_path / "train.csv").write_text("image,text\na.jpg,x\nb.jpg,y\n")
    with pytest.raises(ValueError, match=r"b\.jpg: image cannot be decoded: .* \(.*train\.csv line 3 lists it\)"):
        list(csv_table.read(tmp_path, "train"))
