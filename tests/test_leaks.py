"""Evaluation images are found in training sets, by name and by look; other photographs are not."""

import io
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from xvlm.data.leaks import ALIKE, NEAR, Guard, Hashes, Looks, look_at, names
from xvlm.data.records import Record
from xvlm.data.writing import write_shards

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


def tinted(image: Image.Image, *factors: float) -> Image.Image:
    """Red, green and blue, each made stronger or weaker."""
    channels = zip(image.split(), factors, strict=True)
    return Image.merge(
        "RGB", [one.point(lambda value, by=factor: min(255, round(value * by))) for one, factor in channels]
    )


def warm(image: Image.Image) -> Image.Image:
    return tinted(image, 1.2, 1, 0.8)


def sepia(image: Image.Image) -> Image.Image:
    return tinted(image.convert("L").convert("RGB"), 1, 0.85, 0.65)


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
        assert Looks([look_at(image)]).near(look_at(change(image)))


@pytest.mark.parametrize("change", [warm, sepia])
def test_a_photograph_in_other_colours_is_the_same_one(change):
    for seed in range(10):
        assert Looks([look_at(photograph(seed))]).near(look_at(change(photograph(seed))))


def test_hashes_of_other_photographs_are_far():
    hashes = [look_at(photograph(seed)).hash for seed in range(40)]
    assert min(distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > NEAR
    mirrored = photograph(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert distance(look_at(mirrored).hash, hashes[0]) > ALIKE


def real(most: int) -> list[Image.Image]:
    files = sorted((REAL / "coco_open/images").rglob("*.jpg"))[:most]
    if not files:
        pytest.skip(f"no photographs in {REAL / 'coco_open'}")
    return [Image.open(file).convert("RGB") for file in files]


def test_of_real_photographs_copies_are_found_and_nothing_else():
    images = real(150)
    looks = [look_at(image) for image in images]
    known = Looks(looks)
    for i, image in enumerate(images):
        assert [near.index for near in known.near(looks[i])] == [i]
        assert [near.index for near in known.near(look_at(CHANGES[i % len(CHANGES)](image)))] == [i]


def smaller_by(share: float) -> Callable[[Image.Image], Image.Image]:
    """A crop that takes half of this share of each side off at each border."""

    def crop(image: Image.Image) -> Image.Image:
        x, y = int(image.width * share / 2), int(image.height * share / 2)
        return image.crop((x, y, image.width - x, image.height - y))

    return crop


SHARES = {  # of copies that are found at least
    "squashed": (lambda image: image.resize((224, 224)), 1),
    "small": (lambda image: image.resize((64, 48)), 1),
    "recompressed": (lambda image: Image.open(io.BytesIO(jpeg(image, 10))), 0.99),
    "grey": (lambda image: image.convert("L"), 1),
    "blurred": (lambda image: image.filter(ImageFilter.GaussianBlur(2)), 1),
    "cropped by 2 %": (smaller_by(0.02), 0.99),
    "cropped by 5 %": (smaller_by(0.05), 0.75),
    "cropped by 10 %": (smaller_by(0.1), 0),
    "brighter": (lambda image: ImageEnhance.Brightness(image).enhance(1.4), 0.85),
    "more contrast": (lambda image: ImageEnhance.Contrast(image).enhance(1.5), 0.97),
    "warmer": (warm, 0.9),
    "sepia": (sepia, 0.85),
    "with a white border of 2 %": (lambda image: ImageOps.expand(image, image.width // 50, "white"), 0.3),
    "mirrored": (ImageOps.mirror, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize(("change", "share"), SHARES.values(), ids=SHARES)
def test_the_shares_of_copies_that_the_docs_state(change, share):
    images = real(556)
    known = Looks([look_at(image) for image in images])
    found = sum(i in [near.index for near in known.near(look_at(change(image)))] for i, image in enumerate(images))
    print(f"{found} of {len(images)}")
    assert found >= share * len(images)


def page(random: Random) -> Image.Image:
    """Lines of text, other ones in each."""
    image = Image.new("RGB", (600, 800), "white")
    for y in range(60, 760, 24):
        words = " ".join("".join(random.choices("abcdefghijklmnop", k=random.randint(2, 9))) for _ in range(11))
        ImageDraw.Draw(image).text((50, y), words[:80], fill="black")
    return image


def shape(random: Random) -> Image.Image:
    """One on white, as products are shown."""
    image, (x, y) = Image.new("RGB", (500, 500), "white"), (random.randint(120, 200), random.randint(120, 200))
    draw = ImageDraw.Draw(image)
    draw_one = random.choice([draw.ellipse, draw.rectangle])
    draw_one((250 - x, 250 - y, 250 + x, 250 + y), fill=tuple(random.randint(0, 200) for _ in range(3)))
    return image


@pytest.mark.parametrize(("draw", "share"), [(page, 0), (shape, 1 / 3)])
def test_pages_and_shapes_share_hashes_and_are_told_apart(draw, share):
    """But for shapes of one kind, size and colour."""
    looks = [look_at(draw(Random(seed))) for seed in range(120)]
    known, hashes = Looks(looks[:60]), Hashes([look.hash for look in looks[:60]])
    near = sum(bool(hashes.near(look.hash)) for look in looks[60:])
    assert near > 15
    assert sum(bool(known.near(look)) for look in looks[60:]) <= share * near
    assert all(known.near(look)[0].distance == 0 for look in looks[:60])


def test_a_picture_in_other_colours_is_another_one_unless_it_has_none():
    red, blue, other = (Image.new("RGB", (300, 200), "white") for _ in range(3))
    for image, colour in ((red, (200, 60, 60)), (blue, (60, 60, 200)), (other, (190, 70, 60))):
        ImageDraw.Draw(image).rectangle((100, 50, 220, 150), colour)
    known = Looks([look_at(red)])
    assert known.near(look_at(other)) and known.near(look_at(red.convert("L"))) and not known.near(look_at(blue))
    assert Looks([look_at(Image.new("RGB", (30, 20), "white"))]).near(look_at(Image.new("RGB", (60, 40), "white")))


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
