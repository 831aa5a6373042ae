"""Fast pixels: JPEGs decoded no larger than needed, and what is done to them, against the exact ones."""

import io
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_transforms import SIZE, draw_box, find_box, noise, scene
from torchvision.transforms.v2 import functional as tv

from xvlm import boxes
from xvlm.data import fast_pixels, pixels
from xvlm.data.images import decode_image, decode_small, open_image
from xvlm.data.processor import to_tensor
from xvlm.data.randaugment import COLOUR, GREY, MOVING, Operation, affine_of
from xvlm.data.transforms import AugmentConfig, augment, choose_crop


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB")])
@pytest.mark.parametrize("side", [40, 70, 150, 300, 601])  # decoded whole, and at each scale
def test_fast_pixels_are_nearly_the_exact_ones_of_the_same_crop(kind, mode, side):
    data = scene(side, side + 33, kind, mode)
    config = AugmentConfig(pixels="fast", randaugment="none", hflip=0.0)
    for seed in range(4):
        fast = augment(open_image(data), torch.zeros(0, 4), [], None, config, (32, 32), Random(seed)).pixels
        crop, scale = fast_pixels.shrink(
            open_image(data), choose_crop((side, side + 33), None, config, Random(seed)), (32, 32)
        )
        inside = (*crop[:2], min(crop[2], side), min(crop[3], side + 33))
        exact = pixels.render(decode_image(data), inside, False, (32, 32), [], Image.Resampling.BICUBIC)
        assert (scale == 1) == (kind == "PNG" or side < 100) or seed  # other crops may be small
        assert (exact.int() - fast).abs().float().mean() < 2


@pytest.mark.parametrize("interpolation", ["BICUBIC", "BILINEAR", "LANCZOS"])
def test_fast_pixels_of_one_crop_are_the_exact_ones_but_for_two_bits(interpolation):
    data, crop = noise(90, 70, "JPEG"), (5, 7, 81, 60)
    fast = fast_pixels.render(open_image(data), crop, 1, True, (40, 30), [], Image.Resampling[interpolation])
    exact = pixels.render(decode_image(data), crop, True, (40, 30), [], Image.Resampling[interpolation])
    assert (exact.int() - fast).abs().max() <= 3


@pytest.mark.parametrize("name", COLOUR + MOVING)
def test_every_operation_is_carried_out(name):
    image, size = Image.new("RGB", (96, 64), GREY), (64, 96)  # a grey border: at the border movements differ
    image.paste(decode_image(noise(92, 60)).point(lambda value: 60 + value // 2), (2, 2))
    operations = [Operation(name, -1 if name in MOVING else 1)]
    fast, exact = (
        render(image, (0, 0, 96, 64), *scale, False, size, operations, Image.Resampling.BICUBIC).int()
        for render, scale in ((fast_pixels.render, [1]), (pixels.render, []))
    )
    assert (fast - exact).abs().max() <= 1
    assert ((exact - to_tensor(image)).abs().max() > 1) == (name != "identity")


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", MOVING)
def test_fast_movements_are_the_exact_ones_but_for_a_bit(name, sign):
    image = Image.new("RGB", (64, 48), GREY)  # a grey border: at the border they differ
    image.paste(decode_image(noise(60, 44)), (2, 2))
    exact = to_tensor(pixels.warp(image, affine_of(Operation(name, sign), image.size))).int()
    assert (exact - fast_pixels.move(to_tensor(image), Operation(name, sign))).abs().max() <= 1


@pytest.mark.parametrize(("width", "height"), [(30, 20), (3, 3), (2, 5), (1, 1)])
def test_fast_sharpness_is_the_exact_one_but_for_a_bit(width, height):
    image = decode_image(noise(width, height))
    exact = to_tensor(pixels.recolour(image, "sharpness")).int()
    assert (exact - fast_pixels.sharpen(to_tensor(image))).abs().max() <= 1


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_have_the_pixels_that_pillow_decodes(scale, mode):
    data = scene(61, 47, "JPEG", mode)
    image = open_image(data)
    image.draft("RGB", (61 // scale, 47 // scale))
    assert np.array_equal(decode_small(open_image(data), scale), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("crop", ["none", "random_resized", "keep_box"])
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), width=st.integers(60, 900), height=st.integers(60, 900))
def test_the_box_follows_its_pixels_at_every_scale(crop, seed, width, height):
    left, top = Random(seed).randrange(width // 2), Random(seed).randrange(height // 2)
    box_xyxy = (left, top, left + width // 3, top + height // 3)
    file = io.BytesIO()
    draw_box(width, height, box_xyxy).save(file, "JPEG", quality=95, subsampling=0)
    config = AugmentConfig(crop=crop, randaugment="none", scale=(0.3, 1.0), pixels="fast")
    image = open_image(file.getvalue())
    seen = augment(image, torch.tensor([box_xyxy]).float(), [], 0, config, SIZE, Random(seed))
    assert seen.pixels.shape == (3, 64, 96)
    assert seen.kept == [0] or crop == "random_resized"
    assume(seen.kept)
    found = find_box(tv.to_pil_image(seen.pixels))
    assert np.abs(boxes.xywh_to_xyxy(seen.boxes_xywh)[0].numpy() - found).max() <= 1.5


def test_large_jpegs_are_decoded_small_only_where_the_crop_stays_large_enough():
    def shrunk(kind: str, crop) -> tuple:
        image = open_image(scene(401, 301, kind))
        crop, scale = fast_pixels.shrink(image, crop, (32, 48))
        return crop, scale, decode_small(image, scale).shape[1::-1]

    assert shrunk("JPEG", (0, 0, 401, 301)) == ((0, 0, 408, 304), 8, (51, 38))
    assert shrunk("JPEG", (3, 3, 300, 200)) == ((0, 0, 300, 200), 4, (101, 76))
    assert shrunk("JPEG", (3, 5, 199, 69)) == ((2, 4, 200, 70), 2, (201, 151))
    assert shrunk("JPEG", (3, 5, 98, 69)) == ((3, 5, 98, 69), 1, (401, 301))
    decoded = decode_image(scene(401, 301, "JPEG"))
    assert fast_pixels.shrink(decoded, (0, 0, 401, 301), (32, 48)) == ((0, 0, 401, 301), 1)
    assert decode_small(decoded, 1).shape == (301, 401, 3)
    assert shrunk("PNG", (0, 0, 401, 301)) == ((0, 0, 401, 301), 1, (401, 301))
