"""Boxes against the reference's operations and against counting pixels."""

import json

import pytest
import torch

from xvlm import boxes


def random_xyxy(count: int, size: int, seed: int) -> torch.Tensor:
    """Boxes with whole-number corners and an area, in pixels of a square."""
    g = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, size - 1, (count, 2), generator=g)
    extent = (torch.rand(count, 2, generator=g) * (size - corner - 1)).long() + 1
    return torch.cat([corner, corner + extent], 1).double()


def pixels(box_xyxy: torch.Tensor, size: int) -> torch.Tensor:
    left, top, right, bottom = box_xyxy.long().tolist()
    covered = torch.zeros(size, size, dtype=torch.bool)
    covered[top:bottom, left:right] = True
    return covered


def test_overlaps_equal_the_reference(goldens):
    golden = json.loads((goldens / "functions/functions.json").read_text())["boxes"]
    of = {name: torch.tensor(rows) for name, rows in golden.items()}
    close = {"atol": 1e-6, "rtol": 1e-6}
    a, b = (boxes.cxcywh_to_xyxy(of[f"{name}_cxcywh"]) for name in "ab")
    torch.testing.assert_close(a, of["a_xyxy"], **close)
    torch.testing.assert_close(b, of["b_xyxy"], **close)
    torch.testing.assert_close(boxes.pairwise_iou(a, b), of["iou"], **close)
    torch.testing.assert_close(boxes.giou(a[:, None].expand(-1, len(b), -1), b.expand(len(a), -1, -1)), of["giou"])
    torch.testing.assert_close(boxes.xyxy_to_cxcywh(a), of["back"], **close)


def test_iou_counts_pixels():
    size, a, b = 12, random_xyxy(40, 12, seed=0), random_xyxy(40, 12, seed=1)
    for found, one, other in zip(boxes.iou(a, b).tolist(), a, b, strict=True):
        p, q = pixels(one, size), pixels(other, size)
        assert found == pytest.approx(float((p & q).sum() / (p | q).sum()))


def test_generalised_iou_of_disjoint_boxes_is_negative_and_grows_as_they_approach():
    a = torch.tensor([[0.0, 0, 1, 1]]).expand(3, 4)
    b = torch.tensor([[9.0, 0, 10, 1], [4, 0, 5, 1], [0, 0, 1, 1]])
    torch.testing.assert_close(boxes.giou(a, b), torch.tensor([-0.8, -0.6, 1.0]))


def test_formats_go_there_and_back():
    xyxy = random_xyxy(20, 50, seed=2)
    torch.testing.assert_close(boxes.xywh_to_xyxy(boxes.xyxy_to_xywh(xyxy)), xyxy)
    torch.testing.assert_close(boxes.cxcywh_to_xyxy(boxes.xyxy_to_cxcywh(xyxy)), xyxy)


def test_clipping_and_merging():
    outside = torch.tensor([[-3.0, 2, 5, 99], [4, -1, 20, 8]])
    assert boxes.clip(outside, 10.0, 9.0).tolist() == [[0, 2, 5, 9], [4, 0, 10, 8]]
    assert boxes.merge(outside).tolist() == [-3, -1, 20, 99]


@pytest.mark.parametrize(("grid", "size"), [((4, 4), (32, 32)), ((2, 5), (24, 30))])
def test_patches_of_a_box_are_those_with_a_pixel_of_it(grid, size):
    """A mask says which patches hold a covered pixel, a cover which share of their pixels."""
    side = max(size)
    xyxy = boxes.clip(random_xyxy(60, side, seed=3), float(size[1]), float(size[0]))
    xyxy = xyxy[boxes.area(xyxy) > 0]
    xywh = boxes.xyxy_to_xywh(xyxy)
    patch = size[0] // grid[0], size[1] // grid[1]
    masks, covers = boxes.patch_mask(xywh, grid, size), boxes.patch_cover(xywh, grid, size)
    for box, mask, cover in zip(xyxy, masks, covers, strict=True):
        covered = pixels(box, side)[: size[0], : size[1]].float()
        share = covered.unfold(0, patch[0], patch[0]).unfold(1, patch[1], patch[1]).mean((2, 3)).flatten()
        assert torch.equal(mask, share > 0)
        torch.testing.assert_close(cover, share, atol=1e-6, rtol=1e-6)


def test_a_box_without_area_still_has_a_patch():
    point = torch.tensor([[8.0, 8.0, 0.0, 0.0]])
    assert boxes.patch_mask(point, (4, 4), (32, 32)).sum() == 1
    assert boxes.patch_cover(point, (4, 4), (32, 32)).sum() == 1
