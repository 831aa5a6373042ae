"""Vectors of images and boxes are those the model gives one by one, in either format; what is wrong is said clearly."""

import json
import sys

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from xvlm import embed as embedding
from xvlm.data import scenes
from xvlm.data.processor import Processor, ProcessorConfig
from xvlm.models.xvlm import XVLM

SIZES = {"a.png": (80, 50), "b.jpg": (33, 41), "deep/c.png": (64, 48)}
BOXES = {
    "a.png": {"a.png#0": (0.0, 0.0, 80.0, 50.0), "a.png#1": (40.0, 25.0, 61.5, 50.0), "a.png#2": (3.0, 3.0, 3.5, 4.0)},
    "deep/c.png": {"7": (0.0, 0.0, 32.0, 24.0)},
}
LINES = [
    {"image": "a.png", "boxes_xyxy": list(BOXES["a.png"].values())[:2]},
    {"image": "deep/c.png", "boxes_xyxy": list(BOXES["deep/c.png"].values()), "ids": [7]},
    {"image": "a.png", "boxes_xyxy": list(BOXES["a.png"].values())[2:]},
    {"image": "b.jpg", "boxes_xyxy": []},
]


@pytest.fixture
def images(tmp_path):
    """Images of noise by name, as they lie in a folder."""
    noise = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
    (tmp_path / "images/notes.txt").write_text("no image")
    return embedding.find_images([tmp_path / "images"])


@pytest.fixture
def processor():
    return Processor.from_vocabulary(scenes.vocabulary(), ProcessorConfig(image_size=(24, 40)))


def model(**changes) -> XVLM:
    vision = tiny.VISION.model_copy(update={"image_size": (24, 40)} | changes)
    return tiny.model(tiny.CONFIG.model_copy(update={"vision": vision}))


def written(tmp_path, lines):
    file = tmp_path / "boxes.jsonl"
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return file


def test_names_are_paths_inside_folders_and_names_of_files(images, tmp_path):
    folder = tmp_path / "images"
    assert images == {name: folder / name for name in SIZES}
    assert list(embedding.find_images([folder / "deep", folder / "a.png"])) == ["c.png", "a.png"]
    with pytest.raises(ValueError, match=r"are both called 'c\.png'; give the folder around both"):
        embedding.find_images([folder / "deep", folder / "deep/c.png"])
    with pytest.raises(FileNotFoundError, match=r"absent\.png: no such image or folder"):
        embedding.find_images([folder / "absent.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: no images in this folder"):
        embedding.find_images([tmp_path / "empty"])


def test_a_box_file_gives_boxes_by_image_and_id(images, tmp_path):
    assert embedding.read_boxes(written(tmp_path, LINES), images) == {**BOXES, "b.jpg": {}}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not readable as JSON"),
        ("", "not readable as JSON"),
        ({"image": "a.png", "boxes": []}, "unknown key 'boxes'; did you mean 'boxes_xyxy'"),
        ({"boxes_xyxy": []}, "missing key 'image'"),
        ({"image": "a.png", "boxes_xyxy": [[0, 0, 5]]}, "boxes_xyxy.0.3: Field required|missing key 'boxes_xyxy.0.3'"),
        ({"image": "a.png", "boxes_xyxy": [[0, 0, 5, 5]], "ids": ["x", "y"]}, "2 ids for 1 box"),
        ({"image": "c.png", "boxes_xyxy": []}, r"no image is called 'c\.png'; there are 'a\.png'"),
        ({"image": "a.png", "boxes_xyxy": [[0, 0, 5, 5], [0, 0, 50, 80]]}, "1 of 2 boxes leave the image of 80 x 50"),
        ({"image": "a.png", "boxes_xyxy": [[5, 5, 5, 9]]}, "have no area; the first is box 0"),
        ({"image": "a.png", "boxes_xyxy": [[0, 0, float("nan"), 9]]}, r"is box 0, .*\[0\.0, 0\.0, nan, 9\.0\]"),
        ({"image": "b.jpg", "boxes_xyxy": [[0, 0, 5, 5]], "ids": ["a.png#0"]}, "'a.png#0' is the id of another box"),
        ({"image": "b.jpg", "boxes_xyxy": [[0, 0, 5, 5]], "ids": ["a.png"]}, "'a.png' is the id of another box or im"),
    ],
)
def test_a_wrong_line_is_named_with_its_file(images, tmp_path, line, why):
    file = written(tmp_path, [LINES[0], line])
    with pytest.raises(ValueError, match=rf"boxes\.jsonl, line 2: .*(?:{why})"):
        embedding.read_boxes(file, images)


@pytest.mark.parametrize("pooling", ["hard", "soft"])
def test_vectors_are_those_of_images_and_boxes_one_by_one(images, processor, pooling):
    made = model(pooling=pooling)
    found = embedding.embed(made, processor, images, BOXES, batch_size=2)
    rows = iter(zip(found.ids, found.images, found.boxes_xyxy, torch.from_numpy(found.vectors), strict=True))
    for name, (width, height) in SIZES.items():
        pixels = processor.pixel_values(Image.open(images[name]).convert("RGB"))
        with torch.no_grad():
            whole = made.embed_image(made.encode_image(pixels[None]))[0]
        identifier, of, box, vector = next(rows)
        assert (identifier, of) == (name, name) and np.isnan(box).all()
        torch.testing.assert_close(vector, whole, atol=1e-5, rtol=1e-5)
        for key, expected in BOXES.get(name, {}).items():
            identifier, of, box, vector = next(rows)
            assert (identifier, of, tuple(box)) == (key, name, expected)
            scaled = torch.tensor([expected], dtype=torch.float64) * torch.tensor([40, 24] * 2)
            with torch.no_grad():
                alone = made.embed_regions(pixels, scaled / torch.tensor([width, height] * 2))[0]
            torch.testing.assert_close(vector, alone, atol=1e-5, rtol=1e-5)
    assert next(rows, None) is None and found.skipped == []


def test_the_trunk_sees_each_image_once_however_many_boxes(images, processor, monkeypatch):
    made, calls = model(), []
    forward = made.vision.trunk.forward_features
    monkeypatch.setattr(made.vision.trunk, "forward_features", lambda x: calls.append(len(x)) or forward(x))
    corner = np.random.default_rng(1).uniform(0, 30, (4000, 2))
    many = {f"{i}": (x, y, x + 2, y + 3) for i, (x, y) in enumerate(corner.tolist())}
    assert len(embedding.embed(made, processor, images, {"b.jpg": many}, batch_size=2).ids) == 3 + 4000
    assert calls == [2, 1]


def test_an_image_that_cannot_be_read_is_skipped_and_named(images, processor, tmp_path):
    whole = embedding.embed(model(), processor, images, BOXES)
    images["deep/c.png"].write_bytes(images["deep/c.png"].read_bytes()[:300])
    found = embedding.embed(model(), processor, images, BOXES)
    assert found.ids == whole.ids[:-2]
    np.testing.assert_allclose(found.vectors, whole.vectors[:-2], atol=1e-6)
    (skipped,) = found.skipped
    assert "c.png: image cannot be decoded: " in skipped
    images["b.jpg"].write_text("")
    assert embedding.read_boxes(written(tmp_path, [{"image": "b.jpg", "boxes_xyxy": [[0, 0, 9, 9]]}]), images)
    with pytest.raises(ValueError, match=r"of 1 image none can be read: .*b\.jpg"):
        embedding.embed(model(), processor, {"b.jpg": images["b.jpg"]})


def test_what_cannot_be_embedded_is_refused(images, processor):
    with pytest.raises(ValueError, match=r"a\.png: 1 of 1 boxes leave the image of 80 x 50 pixels"):
        embedding.embed(model(), processor, images, {"a.png": {"x": (0.0, 0.0, 81.0, 50.0)}})
    with pytest.raises(ValueError, match=r"boxes of 'z\.png', which is none of the images"):
        embedding.embed(model(), processor, images, {"z.png": {}})
    lacking = tiny.model(tiny.CONFIG.model_copy(update={"heads": ("box_head",)}))
    with pytest.raises(ValueError, match=r"the model has no image_projection"):
        embedding.embed(lacking, processor, images)


def test_npz_holds_everything(images, processor, tmp_path):
    found, file = embedding.embed(model(), processor, images, BOXES), tmp_path / "vectors.npz"
    embedding.writer_for(file)(found, "mine", file)
    with np.load(file) as kept:
        assert kept["model"] == "mine"
        assert kept["ids"].tolist() == found.ids and kept["images"].tolist() == found.images
        np.testing.assert_array_equal(kept["boxes_xyxy"], found.boxes_xyxy)
        np.testing.assert_array_equal(kept["vectors"], found.vectors)


def test_a_write_that_fails_leaves_the_file_that_was_there(images, processor, tmp_path, monkeypatch):
    def broken(file, **_):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", broken)
    file = tmp_path / "vectors.npz"
    file.write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        embedding.writer_for(file)(embedding.embed(model(), processor, images), "mine", file)
    assert file.read_bytes() == b"old"


def test_parquet_holds_everything(images, processor, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: pip install -e '.[parquet]'")
    found, file = embedding.embed(model(), processor, images, BOXES), tmp_path / "vectors.parquet"
    embedding.writer_for(file)(found, "mine", file)
    table = parquet.read_table(file)
    assert table.schema.metadata[b"model"] == b"mine"
    kept = table.to_pydict()
    assert kept["id"] == found.ids and kept["image"] == found.images
    assert kept["box_xyxy"] == [None if np.isnan(box[0]) else box.tolist() for box in found.boxes_xyxy]
    np.testing.assert_array_equal(np.array(kept["vector"], dtype=np.float32), found.vectors)


def test_a_file_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"vectors\.csv: expected a name that ends in \.npz or \.parquet"):
        embedding.writer_for(tmp_path / "vectors.csv")
    with pytest.raises(FileNotFoundError, match=r"vectors\.npz: there is no folder .*absent"):
        embedding.writer_for(tmp_path / "absent/vectors.npz")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install -e '\.\[parquet\]'; \.npz needs nothing"):
        embedding.writer_for(tmp_path / "vectors.parquet")
