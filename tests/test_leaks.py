"""Evaluation images are found in training sets, by name and by look; other photographs are not."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from xvlm.data.leaks import ALIKE, NEAR, Guard, Hashes, names, perceptual_hash
from xvlm.data.records import Record
from xvlm.data.shards import write_shards

REAL = Path(__file__).parents[2] / "shared/data"


def photograph(seed: int) -> Image.Image:
    """Blurred noise: like a photograph, most of it is in the low frequencies."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def record(name: str, source: str = "made", **more) -> Record:
    return Record(id=name, source=source, width=320, height=240, **more)


def distance(a: int, b: int) -> int:
    return (a ^ b).bit_count()


CHANGES = [
    lambda image: image.resize((image.width // 4, image.height // 4)),
    lambda image: image.resize((224, 224)),
    lambda image: Image.open(io.BytesIO(jpeg(image, 30))),
    lambda image: image.convert("L"),
    lambda image: image.point(lambda value: min(255, round(value * 1.1))),
]


@pytest.mark.parametrize("change", CHANGES)
def test_the_hash_of_a_changed_photograph_is_near(change):
    for seed in range(10):
        image = photograph(seed)
        assert distance(perceptual_hash(image), perceptual_hash(change(image))) <= NEAR


def test_hashes_of_other_photographs_are_far():
    hashes = [perceptual_hash(photograph(seed)) for seed in range(40)]
    assert min(distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > NEAR
    mirrored = photograph(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert distance(perceptual_hash(mirrored), hashes[0]) > ALIKE


def test_of_real_photographs_copies_are_near_and_others_far():
    files = sorted((REAL / "coco_open/images").rglob("*.jpg"))[:150]
    if not files:
        pytest.skip(f"no photographs in {REAL / 'coco_open'}")
    hashes = []
    for i, file in enumerate(files):
        image = Image.open(file).convert("RGB")
        hashes.append(perceptual_hash(image))
        assert distance(hashes[-1], perceptual_hash(CHANGES[i % len(CHANGES)](image))) <= NEAR, file
    assert min(distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > NEAR


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_near_hashes_are_those_that_comparing_with_all_finds(data):
    wanted = data.draw(st.integers(0, 2**64 - 1))
    flips = data.draw(st.lists(st.sets(st.integers(0, 63), max_size=10), max_size=20))
    hashes = [wanted ^ sum(1 << bit for bit in bits) for bits in flips]
    expected = sorted((len(bits), i) for i, bits in enumerate(flips) if len(bits) <= NEAR)
    assert [(near.distance, near.index) for near in Hashes(hashes).near(wanted)] == expected


def test_one_photograph_has_one_name_in_all_sets_made_of_it():
    assert names(record("000000123456", "coco")) == ["coco:123456"]
    assert names(record("7", "visual_genome", same_as={"coco": "123456", "flickr": "99"}))[1:] == [
        "coco:123456",
        "flickr:99",
    ]
    assert names(record("a-b")) == ["made:a-b"]


@pytest.fixture
def guard(tmp_path):
    held_out = [record("5", "coco"), record("held-out"), record("9", "coco", same_as={"flickr": "77"})]
    samples = [(one, jpeg(photograph(100 + i))) for i, one in enumerate(held_out)]
    write_shards(samples, tmp_path / "test", progress=False)
    return Guard([tmp_path / "test"])


def test_names_are_found_whatever_the_picture(guard):
    other = photograph(0)
    assert "(coco:5)" in guard.match(record("1", "visual_genome", same_as={"coco": "000005"}), other)
    assert "9 of" in guard.match(record("2", "flickr30k", same_as={"flickr": "77"}), other)
    assert guard.match(record("1", "visual_genome", same_as={"coco": "6"}), other) is None


def test_an_id_of_the_same_source_has_to_be_borne_out_by_the_picture(guard):
    assert guard.match(record("held-out"), photograph(0)) is None
    slightly_cropped = photograph(101).crop((12, 9, 312, 234))
    assert "(made:held-out)" in guard.match(record("held-out"), slightly_cropped)


def test_pictures_are_found_whatever_the_name(guard):
    smaller = Image.open(io.BytesIO(jpeg(photograph(101).resize((160, 120)), 60)))
    found = guard.match(record("something-else"), smaller)
    assert found.startswith("looks like held-out of ")
    assert guard.match(record("something-else"), photograph(0)) is None


def test_an_evaluation_image_that_cannot_be_decoded_is_an_error(tmp_path):
    write_shards([(record("cut"), jpeg(photograph(0))[:2000])], tmp_path / "test", progress=False)
    with pytest.raises(ValueError, match=r"test: record cut: image cannot be decoded"):
        Guard([tmp_path / "test"])
