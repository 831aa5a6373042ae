"""Pictures: what is drawn, where, in which colour; and that nothing else changes."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from xvlm import viz
from xvlm.types import Grounded

GREY = (128, 128, 128)
BOX = torch.tensor([[100.0, 150.0, 300.0, 350.0]])


@pytest.fixture
def photograph() -> Image.Image:
    return Image.new("RGB", (600, 500), GREY)


def colours_on(image: Image.Image, edges: tuple[int, int, int, int]) -> set[tuple[int, ...]]:
    return {tuple(pixel) for pixel in np.asarray(image.crop(edges)).reshape(-1, 3).tolist()}


def test_a_box_is_drawn_on_its_edge_only(photograph):
    drawn = viz.draw(photograph, BOX)
    orange = ImageColor.getrgb(viz.COLOURS[0])
    for x, y in ((100, 250), (300, 250), (200, 150), (200, 350)):
        assert drawn.getpixel((x, y)) == orange
    assert colours_on(drawn, (110, 160, 290, 340)) == {GREY}
    assert colours_on(drawn, (310, 0, 600, 500)) == {GREY}
    assert drawn.size == photograph.size
    assert photograph.getpixel((100, 250)) == GREY  # a copy was drawn on


def test_a_label_is_dark_on_light_and_stays_in_the_image(photograph):
    corner = torch.tensor([[540.0, 0.0, 600.0, 60.0]])
    plain, labelled = viz.draw(photograph, corner), viz.draw(photograph, corner, ["a wide label"])
    changed = np.argwhere((np.asarray(plain) != np.asarray(labelled)).any(2))
    (top, left), (bottom, right) = changed.min(0), changed.max(0)
    assert 0 <= top <= bottom < 80  # at its box
    assert right - left > 60  # and wider than that, so it was moved to the left
    assert right <= 599
    plate = colours_on(labelled, (int(left), int(top), int(right), int(bottom)))
    assert {(0, 0, 0)} <= plate  # ink


def test_labels_do_not_cover_each_other(photograph):
    same = BOX.repeat(4, 1)
    plates: list = []
    for _ in range(4):
        plates.append(viz._place(tuple(same[0].tolist()), (80.0, 20.0), photograph.size, plates, []))
    for i, plate in enumerate(plates):
        assert all(viz._overlap(plate, other) == 0 for other in plates[:i])
        assert plate[0] >= 0
        assert plate[2] <= photograph.width


def test_labels_do_not_cover_small_things(photograph):
    small, behind = (200.0, 200.0, 220.0, 220.0), (195.0, 150.0, 300.0, 199.0)
    plate = viz._place(small, (60.0, 24.0), photograph.size, [], [small, behind])
    assert viz._overlap(plate, small) == viz._overlap(plate, behind) == 0
    whole = (0.0, 0.0, 600.0, 500.0)  # covers everything: its plate has to lie on it, and keeps off the small one
    plate = viz._place(whole, (60.0, 24.0), photograph.size, [], [whole, (0.0, 0.0, 30.0, 30.0)])
    assert viz._overlap(plate, (0.0, 0.0, 30.0, 30.0)) == 0


def test_numbers_say_which_box_is_which(photograph):
    edges = tuple(BOX[0].tolist())
    things = [("a dog", [edges]), ("no cat", []), ("two cats", [edges, (400.0, 10.0, 500.0, 90.0)]), ("more", [])]
    drawn, legend = viz.numbered(photograph, things, most=3)
    assert legend == "1 a dog\n- no cat\n3 two cats\nand 1 more"
    assert drawn.getpixel((450, 10)) == ImageColor.getrgb(viz.COLOURS[2])
    assert drawn.getpixel((200, 150)) == ImageColor.getrgb(viz.COLOURS[0])
    plain, nothing = viz.numbered(photograph, [("a dog", [])])
    assert (colours_on(plain, (0, 0, 600, 500)), nothing) == ({GREY}, "- a dog")


def test_true_boxes_are_dashed(photograph):
    drawn = viz.draw(photograph, torch.zeros(0, 4), true_xyxy=BOX)
    assert drawn.tobytes() != viz.draw(photograph, torch.zeros(0, 4), true_xyxy=BOX, true_labels=["dog"]).tobytes()
    edge = {drawn.getpixel((x, 150)) for x in range(110, 290)}
    assert edge == {(255, 255, 255), (0, 0, 0)}


def test_a_small_image_is_enlarged_with_its_boxes(photograph):
    drawn = viz.draw(photograph.resize((60, 50)), BOX / 10, least_side=600)
    assert drawn.size == (600, 500)
    assert drawn.getpixel((100, 250)) == ImageColor.getrgb(viz.COLOURS[0])


def test_of_a_grounding_the_best_are_drawn_with_scores_and_masks(photograph):
    boxes_xyxy = torch.cat([BOX, BOX + 100, BOX + 120])
    masks = torch.zeros(3, 500, 600, dtype=torch.bool)
    masks[0, 200:250, 150:250] = True
    found = Grounded(boxes_xyxy, torch.tensor([0.9, 0.5, 0.1]), masks=masks)
    drawn = viz.draw(photograph, found, top=2)
    assert ImageColor.getrgb(viz.COLOURS[2]) not in colours_on(drawn, (0, 0, 600, 500))  # the third is left out
    assert drawn.getpixel((250, 450)) == ImageColor.getrgb(viz.COLOURS[1])
    shaded = drawn.getpixel((160, 225))
    assert shaded != GREY
    assert shaded[0] > shaded[2]  # towards orange
    assert drawn.getpixel((160, 300)) == GREY  # in the box, outside the mask
    assert drawn.tobytes() == viz.draw(photograph, found, ["0.90", "0.50"], top=2).tobytes()


def test_the_only_box_of_a_grounding_has_its_phrase(photograph):
    found = Grounded(BOX, torch.tensor([0.0]), presence=0.0, phrase="the red disc")
    assert viz.draw(photograph, found).tobytes() == viz.draw(photograph, BOX, ["the red disc"]).tobytes()
    unasked = Grounded(BOX, torch.tensor([0.0]))
    assert viz.draw(photograph, unasked).tobytes() == viz.draw(photograph, BOX).tobytes()


def test_labels_that_do_not_fit_the_boxes(photograph):
    with pytest.raises(ValueError, match="one for each of the 1 boxes, found 2"):
        viz.draw(photograph, BOX, ["one", "two"])


def test_a_heat_map_is_brightest_where_the_map_is(photograph):
    values = torch.zeros(5, 6)
    values[1, 4] = 3.0
    hot = np.asarray(viz.heatmap(photograph, values)).sum(2)
    assert hot.shape == (500, 600)
    y, x = np.unravel_index(hot.argmax(), hot.shape)
    assert 100 <= y < 200  # the second of five rows
    assert 400 <= x < 500  # the fifth of six columns
    assert len(np.unique(np.asarray(viz.heatmap(photograph, torch.ones(2, 2))).reshape(-1, 3), axis=0)) == 1


def test_each_word_of_each_phrase_has_its_map_and_its_share(photograph):
    left, right = torch.zeros(2, 2), torch.zeros(2, 2)
    left[:, 0], right[:, 1] = 3.0, 1.0
    strip = viz.heat_of_words(
        photograph, [("a dog", [("a", left), ("dog", right)]), ("sky", [("sky", right)])], width=60
    )
    assert strip.width == 3 * 60 + 4 * 12
    cells = np.asarray(strip).astype(int).sum(2)
    top = slice(12, 62)
    assert cells[top, 84:104].mean() > 2 * cells[top, 124:144].mean()  # the first word looks left,
    assert cells[top, 196:216].mean() > 2 * cells[top, 156:176].mean()  # the second right
    assert (np.asarray(strip)[top.start : top.stop, 12:72] == GREY).all()  # beside the image itself
    rows = np.flatnonzero((np.asarray(strip)[:, 12:72] == GREY).all((1, 2)))
    assert (cells[rows[-1], 156:216] == 3 * 255).all()  # the second phrase has a word less


def test_a_contact_sheet_has_every_picture_in_its_place():
    reds = [Image.new("RGB", (40, 20 + 20 * i), (200, i, 0)) for i in range(5)]
    sheet = viz.contact_sheet(reds, [f"caption {i} " + "word " * 30 * (i == 0) for i in range(5)], 2, width=100)
    assert sheet.width == 2 * 100 + 3 * 12
    places = []
    for i in range(5):
        ys, xs = np.nonzero((np.asarray(sheet) == (200, i, 0)).all(2))
        assert xs.max() - xs.min() == 99
        assert ys.max() - ys.min() == 50 * (i + 1) - 1
        places.append((int(xs.min()), int(ys.min())))
    assert [x for x, _ in places] == [12, 124, 12, 124, 12]
    assert places[0][1] == places[1][1] < places[2][1] == places[3][1] < places[4][1]
    below = np.asarray(sheet.crop((12, 70, 112, places[2][1])))
    assert (below < 100).any()  # the wrapped caption
    assert places[2][1] > 12 + 100 + 5 * 14  # made room for its lines


def test_wrapping_keeps_every_word():
    font = viz.ImageFont.load_default(14)
    text = "the quick brown fox jumps over the lazy dog"
    lines = viz._wrap(text, font, 100)
    assert " ".join(lines) == text
    assert len(lines) > 2
    assert all(font.getlength(line) <= 100 for line in lines)
    assert viz._wrap("first\nsecond", font, 100) == ["first", "second"]


def test_a_contact_sheet_of_nothing():
    with pytest.raises(ValueError, match="found 0 and 1"):
        viz.contact_sheet([], ["lonely"])


def test_curves_are_one_plot_per_key():
    rows = [{"step": i, "loss": 3.0 - i / 10} for i in range(20)] + [{"step": 20, "r1": 0.5}]
    one, four = (Image.open(BytesIO(viz.curves(rows, keys))) for keys in (["loss"], ["loss", "r1", "loss", "r1"]))
    assert one.format == "PNG"
    assert four.width == 3 * one.width
    assert four.height == 2 * one.height
    assert np.asarray(four)[-10, -10, 3] == 0  # the two free places are empty, the page shines through
    with pytest.raises(ValueError, match="'step' and 'accuracy'"):
        viz.curves(rows, ["accuracy"])
    with pytest.raises(ValueError, match="no keys"):
        viz.curves(rows, [])


def test_histograms_count():
    one = np.asarray(Image.open(BytesIO(viz.histograms({"words": [1, 1, 1, 2]}))))
    blue = (np.abs(one[..., :3].astype(int) - ImageColor.getrgb("#56b4e9")).sum(2) < 30) & (one[..., 3] > 200)
    heights = blue.sum(0)[blue.any(0)]
    assert heights[5] == pytest.approx(3 * heights[-5], rel=0.2)  # three ones, one two
    three = Image.open(BytesIO(viz.histograms({"a": [0.5], "b": [1, 2], "c": [0.1, 0.2]})))
    assert three.width == pytest.approx(3 * one.shape[1], rel=0.01)
    for nothing in ({}, {"words": []}):
        with pytest.raises(ValueError, match="no values"):
            viz.histograms(nothing)


def test_the_running_mean_smooths_without_a_shift():
    assert viz._running_mean([float(i) for i in range(100)])[50] == 50
    assert viz._running_mean([0.0, 4.0] * 100)[100] == pytest.approx(2, abs=0.5)
    assert viz._running_mean([7.0]) == [7.0]
