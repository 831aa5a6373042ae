"""What readers have in common: their call, their errors, and what they share to find photographs and cut boxes."""

import inspect
import json
import re
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from photographs import jpeg, place

from xvlm.data import readers
from xvlm.data.pack import OF_FILES, CorpusConfig, Reader, read
from xvlm.data.readers import csv_table, photographs
from xvlm.data.readers.photographs import Found, Photographs
from xvlm.data.records import unchecked

NAMES = [name for name in get_args(Reader) if name != "scenes"]
each_reader = pytest.mark.parametrize("reader", [import_module(f"xvlm.data.readers.{name}") for name in NAMES])


def test_every_reader_is_named_once_and_every_name_is_a_reader():
    files = {path.stem for path in Path(next(iter(readers.__path__))).glob("*.py")} - {
        "__init__",
        "entries",
        "photographs",
    }
    assert files == set(NAMES)
    assert len(NAMES) == len(set(NAMES))


@each_reader
def test_readers_are_called_alike_and_state_their_boxes(reader: ModuleType):
    parameters = inspect.signature(reader.read).parameters
    assert list(parameters)[:2] == ["folder", "split"]
    assert {"images_at", "allow_missing"} <= parameters.keys()
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in list(parameters.values())[2:])
    assert ("files" in parameters) == (reader.__name__.rpartition(".")[2] in OF_FILES)
    assert "Boxes are" in reader.__doc__ or "No boxes" in reader.__doc__
    assert all(extra.default is not inspect.Parameter.empty for extra in list(parameters.values())[2:])


@pytest.mark.parametrize("name", get_args(Reader))
def test_the_page_has_every_reader(name):
    assert f"\n| `{name}` | " in (Path(__file__).parents[1] / "docs/data.md").read_text(encoding="utf-8")


@each_reader
def test_an_empty_folder_is_named_with_what_it_should_hold(reader: ModuleType, tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        list(reader.read(tmp_path, "train"))


@each_reader
def test_a_split_that_is_none_is_named(reader: ModuleType, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=r"garden|refs"):
        list(reader.read(tmp_path, "garden"))


@pytest.mark.parametrize("content", ["{", "[1, 2]", "3", '"text"', "null", "{}", '{"images": 5}', "[[]]", "\xff"])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("coco", "annotations/instances_train.json"),
        ("visual_genome", "image_data.json"),
        ("refcoco", "refs(unc).json"),
        ("refcoco", "refs(unc).p"),
        ("refcoco_json", "instances.json"),
        ("refcoco_json", "finetune_refcoco_train.json"),
        ("openimages", "train-annotations-bbox.csv"),
        ("objects365", "objects365_train.json"),
        ("vqa", "v2_OpenEnded_mscoco_train2014_questions.json"),
        ("nlvr2", "train.json"),
        ("odvg", "train.jsonl"),
        ("grit", "0/0.json"),
        ("grit", "0.tar"),
        ("xvlm_jsonl", "train.jsonl"),
        ("albef_json", "train.json"),
        ("coco_json", "train.json"),
        ("csv_table", "train.csv"),
        ("json_lines", "train.jsonl"),
    ],
)
def test_a_file_of_another_shape_is_one_error_that_names_it(tmp_path, name, file, content):
    (tmp_path / "images").mkdir()
    (tmp_path / "class-descriptions-boxable.csv").write_text("/m/1,Dog\n")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(content.encode("latin-1"))
    reader = import_module(f"xvlm.data.readers.{name}")
    with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path)) as raised:
        list(reader.read(tmp_path, "train"))
    assert "\n" not in str(raised.value)


def test_packing_takes_the_reader_of_that_name(tmp_path):
    place(tmp_path, "a.jpg")
    (tmp_path / "train.jsonl").write_text('{"image": "a.jpg", "captions": ["a dog"]}\n')
    corpus = CorpusConfig(reader="json_lines", folder=tmp_path, out=tmp_path / "out", splits={"train": None})
    ((record, image),) = read(corpus, "train", None)
    assert (record.captions, image) == (["a dog"], (tmp_path / "a.jpg").read_bytes())


# ---------------------------------------------------------------------------------------------------------------------
# Photographs


def test_photographs_are_looked_for_in_every_place_under_every_name(tmp_path):
    place(tmp_path, "a/1.jpg", "b/x/2.jpg", size=(30, 20))
    with Photographs(tmp_path, "none", "a", "b") as images:
        assert images.find("it", "1.jpg").path == tmp_path / "a/1.jpg"
        found = images.find("it", "2.jpg", "x/2.jpg")
        assert (found.path, found.width, found.height) == (tmp_path / "b/x/2.jpg", 30, 20)
        assert found.image == jpeg(30, 20)
        with pytest.raises(FileNotFoundError, match=r"a/3\.jpg: no such photograph, but the list has it"):
            images.find("the list has it", "3.jpg")
    with pytest.raises(FileNotFoundError, match="no photographs; expected in it a folder c, d"):
        Photographs(tmp_path, "c", "d")
    with Photographs(tmp_path, "a", at=[tmp_path / "b/x"], allow_missing=True) as images:
        assert images.find("it", "2.jpg").path == tmp_path / "b/x/2.jpg"
        assert images.find("it", "1.jpg") is None
    with pytest.raises(FileNotFoundError, match="c: no such folder of photographs"):
        Photographs(tmp_path, "a", at=[tmp_path / "a", tmp_path / "c"])


def test_photographs_behind_urls_are_fetched(tmp_path):
    place(tmp_path, "served/a.jpg")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "served")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address, absent = f"http://127.0.0.1:{server.server_port}", []
        with Photographs(tmp_path, ".", allow_missing=absent) as images:
            assert images.find("it", f"{address}/a.jpg").image == jpeg(100, 80)
            assert images.find("it", f"{address}/b.jpg") is None
            assert images.find("it", "http://[x/c.jpg") is None
        server.shutdown()
    assert absent == [f"{address}/b.jpg", "http://[x/c.jpg"]
    with Photographs(tmp_path, ".") as images, pytest.raises(FileNotFoundError, match=r"d\.jpg: no such photograph"):
        images.find("the list has it", f"{address}/d.jpg")


def test_absent_photographs_are_logged_and_listed(tmp_path, caplog):
    place(tmp_path, "a/0.jpg")
    absent: list[str] = ["of another split.jpg"]
    with Photographs(tmp_path, "a", allow_missing=absent) as images:
        found = [images.find("it", f"{i}.jpg") for i in range(13)]
    assert [one is None for one in found] == [False] + [True] * 12
    assert absent == ["of another split.jpg", *(f"{i}.jpg" for i in range(1, 13))]
    assert "12 of 13 photographs are absent: 1.jpg, 2.jpg, " in caplog.text
    assert "10.jpg …" in caplog.text
    caplog.clear()
    with Photographs(tmp_path, "a", allow_missing=True) as images:
        images.find("it", "0.jpg")
    assert caplog.text == ""


def test_known_photographs_of_coco_and_flickr():
    url = "http://farm9.staticflickr.com/8035/8024364858_9c41dc1666_z.jpg"
    assert photographs.known_as("val2014/COCO_val2014_000000391895.jpg", url) == {
        "coco": "391895",
        "flickr": "8024364858",
    }
    assert photographs.known_as("COCO_train2014_000000581857_16.jpg") == {"coco": "581857"}
    assert photographs.known_as("000000391895.jpg", "http://example.org/8024364858_9c41dc1666_z.jpg") == {}


def test_ids_are_made_of_paths():
    assert photographs.identifier("val2014/a.b.jpg") == "val2014_a_b"
    assert photographs.identifier("photos/a.png") == "photos_a_png"
    assert photographs.identifier("_a.JPG") == "_a_JPG"
    assert photographs.identifier("/data/../x.jpg") == "data_x"
    assert photographs.identifier("plain") == "plain"
    assert photographs.identifier("v1.2/plain") == "v1_2_plain"
    urls = ["http://host:8765/a.jpg", "http://host/8765/a.jpg", "https://x.com/img?id=1", "https://x.com/img/id=1"]
    ids = [photographs.identifier(url) for url in urls]
    assert re.fullmatch("http_host_8765_a_[0-9a-f]{8}", ids[0])
    assert len(set(ids)) == 4


@pytest.mark.parametrize(
    ("reader", "file", "content"),
    [
        ("csv_table", "train.csv", "image,text\na.jpg,one\na.png,two\n./a.jpg,three\n"),
        (
            "coco_json",
            "train.json",
            {
                "images": [{"id": i, "file_name": name} for i, name in enumerate(["a.jpg", "a.png", "./a.jpg"])],
                "annotations": [{"image_id": i, "caption": text} for i, text in enumerate(["one", "two", "three"])],
            },
        ),
        (
            "albef_json",
            "train.json",
            [
                {"image": name, "caption": text}
                for name, text in [("a.jpg", "one"), ("a.png", "two"), ("./a.jpg", "three")]
            ],
        ),
    ],
)
def test_images_that_differ_in_little_have_different_ids_and_the_same_image_one(tmp_path, reader, file, content):
    place(tmp_path, "a.jpg", "a.png")
    (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    first, second = (record for record, _ in import_module(f"xvlm.data.readers.{reader}").read(tmp_path, "train"))
    assert (first.id, first.captions) == ("a", ["one", "three"])
    assert (second.id, second.captions) == ("a_png", ["two"])


def test_an_id_does_not_depend_on_the_rows_before_it_and_no_two_images_share_one(tmp_path):
    place(tmp_path, "a.b.jpg", "a_b.jpg")
    (tmp_path / "train.csv").write_text("image,text\na_b.jpg,one\na.b.jpg,two\n")
    with pytest.raises(ValueError, match=r": a\.b\.jpg: its id would be 'a_b', as that of a_b\.jpg; rename one"):
        list(csv_table.read(tmp_path, "train"))


edge = st.floats(-50, 150)
FOUND = Found("the list has it", Path("a.jpg"), b"", 100, 80, Counter())


@settings(deadline=None)
@given(st.tuples(edge, edge, edge, edge))
def test_what_is_cut_off_lies_in_the_image_and_in_the_box(box):
    cut = FOUND.inside(box)
    x0, y0, x1, y1 = box
    if cut is None:
        assert min(x1, 100) <= max(x0, 0) or min(y1, 80) <= max(y0, 0)
    else:
        left, top, right, bottom = cut
        assert max(x0, 0) == left < right == min(x1, 100)
        assert max(y0, 0) == top < bottom == min(y1, 80)


def test_a_box_may_leave_the_image_by_a_little():
    assert FOUND.nearly_inside("a", (-2.0, 0.0, 10.0, 81.6)) == (0, 0, 10, 80)
    for box in [(-2.1, 0.0, 9.0, 9.0), (0.0, 0.0, 9.0, 81.7), (60.0, 20.0, 150.0, 70.0), (101.0, 0.0, 102.0, 9.0)]:
        with pytest.raises(
            ValueError, match=r"line 3: box \(.*\) as left, top.* inside the 100x80 image or out of it by 2%"
        ):
            FOUND.nearly_inside("line 3", box)
    for box in [(5.0, 5.0, 5.0, 9.0), (9.0, 5.0, 5.0, 9.0), (float("nan"), 0.0, 5.0, 9.0)]:
        with pytest.raises(ValueError, match="expected one with an area"):
            FOUND.nearly_inside("line 3", box)


def test_boxes_that_are_cut_off_or_left_out_are_counted_and_logged(tmp_path, caplog):
    place(tmp_path, "a/1.jpg", "a/2.jpg")
    with Photographs(tmp_path, "a") as images:
        first, second = (images.find("it", f"{i}.jpg") for i in (1, 2))
        assert first.inside((50.0, 50.0, 2000.0, 60.0)) == (50, 50, 100, 60)
        assert second.inside((-1.0, 0.0, 10.0, 10.0)) == first.inside((-0.9, 0.0, 10.0, 10.0)) == (0, 0, 10, 10)
        assert first.inside((100.0, 0.0, 120.0, 10.0)) is None
    assert "cut off at the border of their image, by a pixel or more: 2 (xvlm" in caplog.text
    assert "left out, without area in their image: 1 (xvlm" in caplog.text


def test_shares_of_the_size_are_no_pixels():
    with pytest.raises(ValueError, match=r"line 3: box \(0\.1, 0\.2, 0\.3, 0\.4\) .* these look like shares of it"):
        FOUND.nearly_inside("line 3", (0.1, 0.2, 0.3, 0.4))
    small = FOUND._replace(width=8, height=8)
    assert small.nearly_inside("line 3", (0.0, 0.0, 1.0, 1.0)) == (0, 0, 1, 1)
    with unchecked():
        assert FOUND.nearly_inside("line 3", (0.1, 0.2, 0.3, 0.4)) == (0.1, 0.2, 0.3, 0.4)
