"""Whatever shards and images hold: one clear error or a sample left out and counted, little memory, the rest read."""

import io
import json
from itertools import islice

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from test_streams import VOCABULARY, made
from test_transforms import claim_size, noise

from xvlm.data import check
from xvlm.data.images import MAX_PIXELS, decode_image
from xvlm.data.processor import Processor, ProcessorConfig
from xvlm.data.readers import json_lines
from xvlm.data.readers.photographs import Photographs
from xvlm.data.records import Record
from xvlm.data.shards import INDEX, BrokenSample, Shards
from xvlm.data.stream_config import StreamConfig
from xvlm.data.streams import loader
from xvlm.data.words import WordMasking
from xvlm.data.writing import write_shards


@pytest.fixture(scope="module")
def processor():
    return Processor.from_vocabulary(VOCABULARY, ProcessorConfig(image_size=(24, 32)))


BOMBS = {"above our limit": (10_001, 10_000), "above Pillow's too": (20_000, 20_000)}


def bomb(width: int, height: int) -> bytes:
    return claim_size(noise(4, 4), width, height)


@pytest.mark.parametrize("size", BOMBS.values(), ids=BOMBS)
def test_an_image_of_very_many_pixels_is_refused_by_its_header(monkeypatch, size):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("took memory for its pixels"))
    with pytest.raises(ValueError, match=r"image cannot be decoded: .*pixels.* \(\d+ bytes\)$"):
        decode_image(bomb(*size))


def test_our_limit_does_not_move_with_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ValueError, match=f"20000x20000 is more than {MAX_PIXELS:,} pixels"):
        decode_image(bomb(20_000, 20_000))


@pytest.mark.parametrize("pixels", ["exact", "fast"])
def test_a_bomb_in_a_shard_is_left_out_and_counted(tmp_path, processor, pixels):
    record = Record(id="bomb", source="made", width=20_000, height=20_000, captions=["a square"])
    write_shards([*map(made, range(3)), (record, bomb(20_000, 20_000))], tmp_path / "s", progress=False)
    config = StreamConfig(shards=[tmp_path / "s"], grain="caption", images=4, workers=0, augment={"pixels": pixels})
    (batch,) = islice(loader(config, processor, WordMasking(), seed=0, start=0), 1)
    assert sorted(batch.ids) == ["made0", "made1", "made2"]
    (skipped,) = batch.skipped
    assert skipped.startswith("s/000000.tar/bomb: image cannot be decoded: ")


def test_a_bomb_in_your_own_folder_is_named(tmp_path):
    (tmp_path / "bomb.png").write_bytes(bomb(20_000, 20_000))
    (tmp_path / "train.jsonl").write_text('{"image": "bomb.png", "captions": ["a"]}\n')
    with pytest.raises(ValueError, match=r"bomb\.png: image cannot be decoded: .*pixels"):
        list(json_lines.read(tmp_path, "train"))


def test_a_file_too_large_to_be_an_image_is_not_read(tmp_path):
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(2**33)  # takes no room on disk
    with Photographs(tmp_path, ".") as images, pytest.raises(ValueError, match=r"huge\.jpg: 8589934592 bytes"):
        images.find("it", "huge.jpg")


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ([512, 2**45, 512, 20], "ends early"),
        ([2**50, 10, 512, 20], "ends early"),
        ([-512, 10, 512, 20], "index"),
        ([512, -1, 512, 20], "index"),
    ],
)
def test_an_index_that_lies_about_sizes_costs_no_memory(tmp_path, lie, reason):
    write_shards(map(made, range(3)), tmp_path, progress=False)
    index = json.loads((tmp_path / INDEX).read_text())
    index["shards"][0]["samples"][1][1:] = lie
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises((BrokenSample, ValueError), match=reason):
        Shards(tmp_path).read(1)


garbage = st.one_of(
    st.binary(max_size=64),
    st.sampled_from([b"null", b"[]", b'"text"', b"3", b"{}", b'{"id": "made1"}', b"[" * 5000, b"\xff\xfe"]),
)
cut = st.tuples(st.integers(0, 2000), st.binary(max_size=8))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    document=garbage | st.none(),
    image=cut | st.none(),
    grain=st.sampled_from(["caption", "region"]),
    fast=st.booleans(),
)
def test_whatever_a_sample_holds_the_others_are_read(tmp_path_factory, processor, document, image, grain, fast):
    folder = tmp_path_factory.mktemp("fuzz")
    write_shards(map(jpeg_of, range(3)), folder, progress=False)
    shards = Shards(folder)
    at, size, json_at, json_size = shards._extents[1].tolist()
    with (folder / "000000.tar").open("r+b") as file:
        if document is not None:
            file.seek(json_at)
            file.write((document + b" " * json_size)[:json_size])
        if image is not None:
            file.seek(at + min(image[0], size))
            file.write(image[1][: max(size - image[0], 0)])
    augment = {"pixels": "fast" if fast else "exact"}
    report = check.check(check.packed(folder))
    assert report.records >= 2
    assert {problem.record for problem in report.problems} <= {"made1", ""}  # "": the shard is not what was packed
    config = StreamConfig(
        shards=[folder], grain=grain, images=3, workers=0, max_skipped_share=1, augment=augment, kinds=["region"]
    )
    (batch,) = islice(loader(config, processor, WordMasking(), seed=0, start=0), 1)
    assert {"made0", "made2"} <= set(batch.ids) <= {"made0", "made1", "made2"}
    assert ("made1" in batch.ids) == (not batch.skipped)
    assert all("/000000.tar/made1: " in line and "\n" not in line for line in batch.skipped)


def jpeg_of(i: int) -> tuple[Record, bytes]:
    record, image = made(i)
    file = io.BytesIO()
    Image.open(io.BytesIO(image)).save(file, "JPEG")
    return record, file.getvalue()
