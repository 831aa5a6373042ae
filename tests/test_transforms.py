"""Transforms: a rectangle drawn at a box stays under the box, words follow flips, images decode or say why not."""

import io
import json
import re
import struct
import warnings
import zlib
from random import Random
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms.v2 import functional as tv

from xvlm import boxes
from xvlm.data import randaugment, transforms
from xvlm.data.images import Undecodable, decode_image, open_image
from xvlm.data.processor import Processor, ProcessorConfig
from xvlm.data.transforms import AugmentConfig, augment, crop_around, place_boxes, random_resized_crop, swap_sides

PLAIN = {"crop": "none", "hflip": 0.0, "randaugment": "none"}
SIZE = (64, 96)  # height, width of what comes out


@st.composite
def pictures(draw):
    """Width, height and an integer box of at least 12 pixels a side."""
    width, height = draw(st.integers(30, 120)), draw(st.integers(30, 120))
    left, top = draw(st.integers(0, width - 12)), draw(st.integers(0, height - 12))
    right, bottom = draw(st.integers(left + 12, width)), draw(st.integers(top + 12, height))
    return width, height, (left, top, right, bottom)


def draw_box(width: int, height: int, box_xyxy: tuple[int, int, int, int]) -> Image.Image:
    """Red on blue."""
    image = Image.new("RGB", (width, height), (0, 0, 255))
    image.paste((255, 0, 0), box_xyxy)
    return image


def find_box(image: Image.Image) -> np.ndarray:
    """Where it is red, ``xyxy``."""
    pixels = np.array(image).astype(int)
    rows, columns = np.nonzero(pixels[..., 0] - pixels[..., 2] > 0)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


# Boxes.


@pytest.mark.parametrize("crop", ["none", "random_resized", "keep_box"])
@settings(deadline=None, max_examples=60)
@given(picture=pictures(), seed=st.integers(0, 2**32))
def test_the_box_follows_what_it_is_drawn_on(crop, picture, seed):
    *size, box_xyxy = picture
    config = AugmentConfig(crop=crop, randaugment="none", scale=(0.3, 1.0))
    seen = augment(draw_box(*size, box_xyxy), torch.tensor([box_xyxy]).float(), [], 0, config, SIZE, Random(seed))
    assert seen.pixels.shape == (3, 64, 96)
    assert seen.kept == [0] or crop == "random_resized"
    assume(seen.kept)
    found = find_box(tv.to_pil_image(seen.pixels))
    assert np.abs(boxes.xywh_to_xyxy(seen.boxes_xywh)[0].numpy() - found).max() <= 1


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), box_xyxy=st.sampled_from([(20, 20, 40, 50), (30, 25, 60, 35), (35, 28, 60, 40)]))
def test_the_box_follows_what_moves_pixels(seed, box_xyxy):
    config = AugmentConfig(crop="none", hflip=0.5, randaugment="full")
    with mock.patch.object(randaugment, "COLOUR", ("identity", "brightness")):  # the others colour the grey fill
        seen = augment(draw_box(96, 64, box_xyxy), torch.tensor([box_xyxy]).float(), [], 0, config, SIZE, Random(seed))
    red, _, blue = seen.pixels.numpy().astype(int)
    rows, columns = np.nonzero(red - blue > 100)
    found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    left, top, right, bottom = boxes.xywh_to_xyxy(seen.boxes_xywh)[0].tolist()
    assert found[0] >= left - 1.5 and found[1] >= top - 1.5 and found[2] <= right + 1.5 and found[3] <= bottom + 1.5


@pytest.mark.parametrize("crop", ["none", "random_resized", "keep_box"])
@settings(deadline=None, max_examples=40)
@given(picture=pictures(), seed=st.integers(0, 2**32))
def test_masks_follow_what_they_are_drawn_on(crop, picture, seed):
    """A disc, which unlike its box says which way it was turned; a second box has none of it."""
    width, height, box = picture
    rows, columns = np.mgrid[:height, :width] + 0.5
    centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    radii = (box[2] - box[0]) / 2, (box[3] - box[1]) / 2
    disc = ((columns - centre[0]) / radii[0]) ** 2 + ((rows - centre[1]) / radii[1]) ** 2 <= 1
    image = Image.fromarray(np.where(disc[..., None], [255, 0, 0], [0, 0, 255]).astype(np.uint8))
    masks = torch.from_numpy(np.stack([disc, np.zeros_like(disc)]))
    boxes_xyxy = torch.tensor([box, (0, 0, width, height)]).float()
    with mock.patch.object(randaugment, "COLOUR", ("identity", "brightness")):  # the others colour the grey fill
        config = AugmentConfig(crop=crop, scale=(0.5, 1.0))
        seen = augment(image, boxes_xyxy, [], 0, config, SIZE, Random(seed), masks=masks)
    assert seen.masks.shape == (len(seen.kept), *SIZE)
    red, green, blue = seen.pixels.int()
    reddish, clear = red - green > 20, red - blue > 100  # moved twice, a border pixel is a mixture
    for i, mask in zip(seen.kept, seen.masks, strict=True):
        if i == 0:
            assert not (mask & ~around(reddish)).any() and not (clear & ~around(mask)).any()
        else:
            assert not mask.any()


def around(mask: torch.Tensor) -> torch.Tensor:
    """The mask and two pixels more on every side."""
    return torch.nn.functional.max_pool2d(mask[None].float(), 5, 1, 2)[0] > 0


def test_without_masks_there_are_none():
    seen = augment(Image.new("RGB", (9, 9)), torch.zeros(0, 4), [], None, AugmentConfig(), SIZE, Random(0))
    assert seen.masks is None


def test_a_box_that_is_moved_out_of_the_image_is_dropped():
    config = AugmentConfig(crop="none", hflip=0.0, randaugment="full")
    edge = torch.tensor([[0.0, 20.0, 10.0, 40.0], [30.0, 20.0, 40.0, 40.0]])
    seen = [augment(Image.new("RGB", (96, 64)), edge, [], 0, config, SIZE, Random(seed)) for seed in range(60)]
    assert {tuple(one.kept) for one in seen} == {(0, 1), (1,)}
    assert any((one.boxes_xywh[-1] - torch.tensor([30, 20, 10, 20])).abs().max() > 5 for one in seen)


def test_region_samples_are_the_references(goldens):
    functions = json.loads((goldens / "functions" / "functions.json").read_text())
    said = dict(re.findall(r"(\w+) ([\d.]+)", functions["region_samples"]["about"]))
    side, most, visible_from = int(said["image_res"]), int(said["max_regions"]), float(said["min_perc_in_image"])
    size, grid = (side, side), (side // int(said["patch"]),) * 2
    rows = functions["region_samples"]["rows"]
    assert rows
    length = len(rows[0]["text_ids"][0])
    processor = Processor.from_vocabulary(functions["tokenizer"]["vocab"], ProcessorConfig(max_tokens=length))
    for row in rows:
        elements = torch.tensor([element["bb"] for element in row["elems"]])
        placed, visible = place_boxes(boxes.xywh_to_xyxy(elements.double()), tuple(row["crop_xyxy"]), row["flip"], size)
        taken = [i for i in row["order"] if visible[i] > visible_from][: most - (row["caption"] is not None)]
        boxes_xywh, texts = placed[taken], []
        for i in taken:
            texts.append(f"{row['elems'][i].get('attributes', '')} {row['elems'][i]['caption']}")
        if row["caption"] is not None:
            boxes_xywh = torch.cat([torch.tensor([[0.0, 0.0, side, side]]).double(), boxes_xywh])
            texts.insert(0, row["caption"])
        assert torch.equal(transforms.targets(boxes_xywh, size), torch.tensor(row["target_bbox"]))
        assert [int(i == 0 and row["caption"] is not None) for i in range(len(texts))] == row["is_image"]
        masks = boxes.patch_mask(boxes_xywh, grid, size)
        ones = [[0, *(1 + mask.nonzero()[:, 0]).tolist()] for mask in masks]
        assert ones == row["image_atts_ones"]
        ids = [processor.encode(text)[0] for text in texts]
        assert [[*one, *[0] * (length - len(one))] for one in ids] == row["text_ids"]


def test_boxes_leave_when_half_of_them_is_out():
    boxes_xyxy = torch.tensor([[0.0, 0, 20, 10], [1.0, 0, 21, 10], [50.0, 0, 60, 10], [0.0, 0, 5, 5]])
    placed, visible = place_boxes(boxes_xyxy, (10, 0, 40, 30), False, (30, 30))
    assert torch.equal(visible, torch.tensor([0.5, 0.55, 0.0, 0.0], dtype=torch.float64))
    assert placed[1].tolist() == [0, 0, 11, 10]
    with mock.patch.object(transforms, "choose_crop", lambda *_: (10, 0, 40, 30)):
        config = AugmentConfig(**PLAIN)
        assert augment(Image.new("RGB", (60, 30)), boxes_xyxy, [], None, config, (30, 30), Random(0)).kept == [1]


@given(pictures(), st.integers(0, 2**32))
def test_a_crop_around_a_box_contains_it(picture, seed):
    width, height, box = picture
    left, top, right, bottom = crop_around((width, height), [max(0.0, edge - 0.25) for edge in box], Random(seed))
    assert 0 <= left <= box[0] and box[2] <= right <= width
    assert 0 <= top <= box[1] and box[3] <= bottom <= height


def test_a_crop_around_a_box_reaches_from_the_box_to_the_edges():
    crops = [crop_around((9, 9), (2.0, 1.0, 7.0, 8.0), Random(seed)) for seed in range(200)]
    assert [set(border) for border in zip(*crops, strict=True)] == [{0, 1, 2}, {0, 1}, {7, 8, 9}, {8, 9}]


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32))
def test_random_crops_lie_in_the_image(width, height, seed):
    left, top, right, bottom = random_resized_crop((width, height), (0.2, 1.0), (3 / 4, 4 / 3), Random(seed))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_random_crops_have_the_area_and_aspect_asked_for():
    crops = [random_resized_crop((1000, 1000), (0.2, 0.5), (0.5, 2.0), Random(seed)) for seed in range(300)]
    shares = [(r - left) * (b - t) / 1e6 for left, t, r, b in crops]
    aspects = [(r - left) / (b - t) for left, t, r, b in crops]
    assert 0.198 < min(shares) < 0.22 and 0.48 < max(shares) < 0.502
    assert 0.498 < min(aspects) < 0.54 and 1.85 < max(aspects) < 2.01
    assert sum(aspect < 1 for aspect in aspects) == pytest.approx(150, abs=40)  # uniform in the logarithm
    assert random_resized_crop((1000, 10), (0.9, 1.0), (3 / 4, 4 / 3), Random(0)) == (493, 0, 506, 10)


# Words.


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("the man left of the dog", "the man right of the dog"),
        ("the leftmost and the RIGHT one", "the rightmost and the LEFT one"),
        ("Right-hand side, bright light", "Left-hand side, bright light"),
        ("leftover copyright on the right.", "leftover copyright on the left."),
        ("a left, a right", "a right, a left"),
        ("on the lefthand side, facing rightwards", "on the righthand side, facing leftwards"),
        ("topleft, BottomRight, upper-left", "topright, BottomLeft, upper-right"),
        ("rightside of it, far left2, right_of, left-handed", "leftside of it, far right2, left_of, right-handed"),
        ("the dog on the right behind him", "the dog on the left behind him"),
        ("his right next to her left at last", "his left next to her right at last"),
        ("a man left of the bus that is left of it", "a man right of the bus that is right of it"),
    ],
)
def test_sides_are_swapped_as_whole_words(text, swapped):
    assert swap_sides(text) == swapped
    assert swap_sides(swapped) == text


@pytest.mark.parametrize(
    "text",
    [
        "a woman walks right behind him",
        "Right next to it, right now, right in front of us",
        "looking right at the camera",
        "a plane that has left a trail, and a boat that had left the harbour",
        "food left over, a bag left behind and a bike left alone",
        "all right, right side up, at a right angle",
        "upright, brightly lit, leftovers, copyright",
    ],
)
def test_words_that_are_no_sides_are_left_alone(text):
    assert swap_sides(text) == text


@pytest.mark.parametrize(
    ("words", "texts", "after", "flipped"),
    [
        ("swap", ["left eye", "bright"], ["right eye", "bright"], True),
        ("ignore", ["left eye", "bright"], ["left eye", "bright"], True),
        ("skip", ["left eye", "bright"], ["left eye", "bright"], False),
        ("skip", ["at the topleft", "bright"], ["at the topleft", "bright"], False),
        ("skip", ["an eye", "bright"], ["an eye", "bright"], True),
    ],
)
def test_flips_and_words(words, texts, after, flipped):
    image = draw_box(40, 30, (0, 0, 10, 30))
    config = AugmentConfig(crop="none", hflip=1.0, flip_words=words, randaugment="none")
    seen = augment(image, torch.zeros(0, 4), texts, None, config, (30, 40), Random(0))
    assert seen.texts == after
    assert find_box(tv.to_pil_image(seen.pixels)).tolist() == ([30, 0, 40, 30] if flipped else [0, 0, 10, 30])
    still = config.model_copy(update={"hflip": 0.0})
    assert augment(image, torch.zeros(0, 4), texts, None, still, (30, 40), Random(0)).texts == texts


def test_words_and_pixels_flip_together():
    config = AugmentConfig(crop="none", randaugment="none")
    sides = set()
    for seed in range(20):
        seen = augment(
            draw_box(40, 30, (0, 0, 10, 30)), torch.zeros(0, 4), ["left"], None, config, (30, 40), Random(seed)
        )
        sides.add((seen.texts[0], int(find_box(tv.to_pil_image(seen.pixels))[0])))
    assert sides == {("left", 0), ("right", 30)}


def test_configuration_is_strict():
    with pytest.raises(ValidationError, match="hflp"):
        AugmentConfig(hflp=0.1)
    with pytest.raises(ValidationError, match="crop"):
        AugmentConfig(crop="centre")


# Images.


def noise(width: int, height: int, kind: str = "PNG", **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def test_pixel_values_are_resized_and_normalised():
    config = ProcessorConfig(image_size=(8, 12), mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    processor = Processor.from_vocabulary(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], config)
    image = decode_image(noise(30, 20))
    resized = np.array(image.resize((12, 8), Image.Resampling.BICUBIC)) / 255
    expected = (resized - np.array(config.mean)) / np.array(config.std)
    assert np.abs(processor.pixel_values(image).numpy() - expected.transpose(2, 0, 1)).max() < 1e-6
    assert ProcessorConfig(image_size=32).image_size == (32, 32)
    with pytest.raises(ValidationError, match="image_size"):
        ProcessorConfig(image_size=0)


def scene(width: int, height: int, kind: str, mode: str = "RGB") -> bytes:
    """Soft shapes, as an encoded file."""
    shapes = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    image = Image.fromarray(shapes).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    image.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return file.getvalue()


@pytest.mark.parametrize("cut", [0.6, 0.9])
def test_a_truncated_jpeg_is_undecodable_either_way(cut):
    data = scene(100, 90, "JPEG")
    for pixels in ("exact", "fast"):
        for size in ((32, 32), (80, 80)):
            image = open_image(data[: int(len(data) * cut)])
            config = AugmentConfig(crop="none", pixels=pixels)
            with pytest.raises(Undecodable):
                augment(image, torch.zeros(0, 4), [], None, config, size, Random(0))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_kind_of_image_becomes_rgb(mode):
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode).save(file, "TIFF")
    image = decode_image(file.getvalue())
    assert (image.mode, image.size, image.getpixel((2, 2))) == ("RGB", (5, 4), (255, 255, 255))


def test_orientation_is_left_alone():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert decode_image(noise(30, 20, "JPEG", exif=exif)).size == (30, 20)


def claim_size(png: bytes, width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no bytes"),
        (b"\xff\xd8\xff no jpeg", "neither JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", "neither JPEG"),  # which Ghostscript would run
        (claim_size(noise(4, 4), 0, 4), "no pixels"),
        (noise(40, 40, "JPEG")[:700], "truncated"),
        (noise(40, 40)[:-300], "truncated"),
        (claim_size(noise(4, 4), 10001, 10000), "10001x10000"),
        (claim_size(noise(4, 4), 40000, 40000), "more than 100,000,000 pixels"),
    ],
)
def test_images_that_cannot_be_decoded_say_why(data, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=rf"{reason}.*\({len(data)} bytes\)"):
            decode_image(data)
