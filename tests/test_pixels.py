"""The pixels of an augmented image: colours and movements are the reference's."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_transforms import SIZE, draw_box, find_box

from xvlm import boxes
from xvlm.data.pixels import recolour, warp
from xvlm.data.randaugment import COLOUR, MOVING, Operation, affine_of
from xvlm.data.transforms import move_boxes


@pytest.mark.parametrize("name", COLOUR)
def test_colours_leave_the_box_where_it_is(name):
    box_xyxy = (10, 5, 30, 27)
    assert find_box(recolour(draw_box(40, 30, box_xyxy), name)).tolist() == [*box_xyxy]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", MOVING)
def test_one_movement_moves_the_box_tightly(name, sign):
    image, box = draw_box(96, 64, (40, 24, 60, 40)), torch.tensor([[40.0, 24.0, 20.0, 16.0]])
    affine = affine_of(Operation(name, sign), image.size)
    moved, share = move_boxes(box, affine, SIZE)
    assert share.tolist() == [1.0]
    assert not torch.allclose(moved, box.double(), atol=2)
    found = find_box(warp(image, affine))
    assert np.abs(boxes.xywh_to_xyxy(moved)[0].numpy() - found).max() <= 1.5


def test_movements_are_those_of_level_seven():
    image = Image.new("RGB", (96, 64), (255, 255, 255))
    right = affine_of(Operation("translate_x", 1), image.size)
    assert find_white(warp(image, right)) == (7, 0, 96, 64)
    rotate = affine_of(Operation("rotate", -1), image.size)
    assert np.allclose(rotate @ [48.5, 32.5, 1], [48.5, 32.5])  # about the centre, half a pixel off: see `affine_of`
    assert math.degrees(math.atan2(rotate[1, 0], rotate[0, 0])) == pytest.approx(21)
    assert np.allclose(affine_of(Operation("shear_y", 1), image.size) @ [10.5, 0.5, 1], [10.5, 2.6])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", MOVING)
def test_movements_are_the_references_between_the_middles_of_pixels(name, sign):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    moved = np.array(warp(Image.fromarray(pixels), affine_of(Operation(name, sign), (64, 48)))).astype(int)
    shear, angle = sign * 0.21, math.radians(sign * 21)
    a, b = math.cos(angle), math.sin(angle)
    forward = {
        "shear_x": [[1, shear, 0], [0, 1, 0]],
        "shear_y": [[1, 0, 0], [shear, 1, 0]],
        "translate_x": [[1, 0, sign * 7], [0, 1, 0]],
        "translate_y": [[1, 0, 0], [0, 1, sign * 7]],
        "rotate": [[a, b, (1 - a) * 32 - b * 24], [-b, a, b * 32 + (1 - a) * 24]],
    }[name]
    back = np.linalg.inv([*forward, [0, 0, 1]])
    checked = 0
    for row in range(48):
        for column in range(64):
            x, y, _ = np.round(back @ [column, row, 1], 9)
            if 0 <= x < 63 and 0 <= y < 47:
                i, j = int(y), int(x)
                corners = pixels[i : i + 2, j : j + 2].astype(float)
                rows = corners[0] * (1 - y + i) + corners[1] * (y - i)
                assert np.abs(rows[0] * (1 - x + j) + rows[1] * (x - j) - moved[row, column]).max() < 1 + 1e-9
                checked += 1
            elif x <= -1 or x >= 64 or y <= -1 or y >= 48:
                assert moved[row, column].tolist() == [128, 128, 128]
    assert checked > 48 * 64 / 2


def reference_colours(pixels: np.ndarray, name: str) -> np.ndarray:
    """The reference's dataset/randaugment.py at level 7; sharpness clipped, where the reference's bytes overflow."""
    if name == "sharpness":
        kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
        windows = np.lib.stride_tricks.sliding_window_view(pixels.astype(float), (3, 3), (0, 1))
        smooth = np.rint((windows * kernel).sum((-2, -1))).astype(np.float32)
        sharp = pixels.copy()
        sharp[1:-1, 1:-1] = (smooth + np.float32(1.36) * (pixels[1:-1, 1:-1] - smooth)).clip(0, 255).astype(np.uint8)
        return sharp
    if name == "brightness":
        return (np.arange(256, dtype=np.float32) * np.float32(1.36)).clip(0, 255).astype(np.uint8)[pixels]
    tables = {"identity": lambda channel: np.arange(256), "autocontrast": stretched, "equalize": equalised}
    return np.stack([tables[name](channel).astype(np.uint8)[channel] for channel in np.moveaxis(pixels, 2, 0)], 2)


def stretched(channel: np.ndarray) -> np.ndarray:
    low, high = int(channel.min()), int(channel.max())
    scale = 255 / (high - low) if high > low else 1.0
    return (np.arange(256) * scale - (low * scale if high > low else 0)).clip(0, 255)


def equalised(channel: np.ndarray) -> np.ndarray:
    counts = np.bincount(channel.ravel(), minlength=256)
    step = counts[counts > 0][:-1].sum() // 255
    if step == 0:
        return np.arange(256)
    return (np.cumsum([step // 2, *counts[:-1]]) // step).clip(0, 255)


@pytest.mark.parametrize("name", COLOUR)
def test_colours_are_the_references(name):
    random = np.random.default_rng(1)
    for low, high in ((0, 256), (60, 170), (9, 10)):
        pixels = random.integers(low, high, (40, 30, 3), dtype=np.uint8)
        ours = np.array(recolour(Image.fromarray(pixels), name))
        assert np.array_equal(ours, reference_colours(pixels, name))


def find_white(image: Image.Image) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(np.array(image)[..., 0] > 250)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
