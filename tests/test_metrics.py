"""The figures of merit against values worked out by hand and against slow, obvious code."""

import pytest
import torch

from xvlm import boxes, metrics


def obvious_recall(scores, text_image, k):
    """Sorting row by row; right where no two scores are equal."""
    n_images, n_texts = scores.shape
    asked = [i for i in range(n_images) if i in text_image]
    found_texts = sum(
        any(text_image[t] == i for t in sorted(range(n_texts), key=lambda t: -scores[i, t])[:k]) for i in asked
    )
    found_images = sum(
        text_image[t] in sorted(range(n_images), key=lambda i: -scores[i, t])[:k] for t in range(n_texts)
    )
    return found_texts / len(asked), found_images / n_texts


@pytest.mark.parametrize("seed", range(5))
def test_recall_is_what_sorting_gives(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(7, 20, generator=generator)
    text_image = torch.randint(0, 7, (20,), generator=generator)
    recall = metrics.recall_at_k(scores, text_image, ks=(1, 3, 5))
    for k in (1, 3, 5):
        texts, images = obvious_recall(scores, text_image.tolist(), k)
        assert recall[f"image_to_text_r{k}"] == pytest.approx(texts)
        assert recall[f"text_to_image_r{k}"] == pytest.approx(images)


def test_an_image_is_found_by_the_best_of_its_texts():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.2], [0.8, 0.3, 0.4, 0.7]])
    recall = metrics.recall_at_k(scores, torch.tensor([0, 0, 1, 1]), ks=(1, 2))
    # Image 0: its text 1 is first. Image 1: text 0 is first, its own text 3 second.
    assert recall["image_to_text_r1"] == 0.5
    assert recall["image_to_text_r2"] == 1.0
    # Texts 1 and 3 find their image at once.
    assert recall["text_to_image_r1"] == 0.5
    assert recall["text_to_image_r2"] == 1.0


def test_equal_scores_count_half():
    n = 9
    recall = metrics.recall_at_k(torch.zeros(n, n), torch.arange(n), ks=(1, 4, 5))
    assert recall["image_to_text_r4"] == recall["text_to_image_r4"] == 0.0  # rank 1 + 8 / 2
    assert recall["image_to_text_r5"] == recall["text_to_image_r5"] == 1.0


def test_texts_of_the_same_image_do_not_compete():
    recall = metrics.recall_at_k(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), torch.tensor([0, 0, 1]), ks=(1,))
    assert recall == {"image_to_text_r1": 1.0, "text_to_image_r1": 1.0}


def test_what_was_not_scored_is_not_found():
    scores = torch.full((3, 3), -torch.inf)
    scores[0, 0] = -5.0
    recall = metrics.recall_at_k(scores, torch.arange(3), ks=(1, 10))
    for key, value in recall.items():
        assert value == pytest.approx(1 / 3), key


def test_an_image_without_texts_asks_nothing():
    recall = metrics.recall_at_k(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]), torch.tensor([0, 1]), ks=(1,))
    assert recall == {"image_to_text_r1": 1.0, "text_to_image_r1": 1.0}


@pytest.mark.parametrize(
    ("scores", "text_image", "message"),
    [
        (torch.tensor([[float("nan"), 1.0]]), torch.tensor([0, 0]), "1 of 2 are NaN"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), "0 to 2, but 2 images"),
        (torch.zeros(2, 0), torch.zeros(0, dtype=torch.long), "no texts"),
    ],
)
def test_scores_that_cannot_be_ranked(scores, text_image, message):
    with pytest.raises(ValueError, match=message):
        metrics.recall_at_k(scores, text_image)


def test_grounding_accuracy_includes_the_threshold():
    predicted = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 4], [0, 0, 10, 10]])
    target = torch.tensor([[0.0, 0, 10, 10]]).expand(3, 4)
    assert metrics.grounding_accuracy(predicted, target) == pytest.approx(2 / 3)  # IoU 0.5, 0.4, 1
    assert metrics.grounding_accuracy(predicted, target, threshold=0.6) == pytest.approx(1 / 3)
    assert metrics.mean_iou(predicted, target) == pytest.approx(1.9 / 3)


def test_mean_and_overall_iou_of_the_usual_example():
    """Overlaps of 1/4 and 90/100: 0.575 per phrase, 91/104 overall."""
    predicted = torch.tensor([[0.0, 0, 1, 1], [0, 0, 10, 9]])
    target = torch.tensor([[0.0, 0, 2, 2], [0, 0, 10, 10]])
    assert metrics.mean_iou(predicted, target) == pytest.approx(0.575)
    assert metrics.overall_iou(predicted, target) == pytest.approx(91 / 104) == pytest.approx(0.875)


def test_a_hit_is_told_by_iou_not_by_giou():
    """A square of side 10, moved by 1.7 both ways: MDETR's tool, which asks the GIoU, calls it a miss."""
    target, moved = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[1.7, 1.7, 11.7, 11.7]])
    assert boxes.iou(moved, target).item() == pytest.approx(0.5254, abs=5e-5)
    assert boxes.giou(moved, target).item() == pytest.approx(0.4832, abs=5e-5)
    assert metrics.grounding_accuracy(moved, target) == 1.0


def test_the_references_overlap_counts_the_last_pixel_and_decides_alike():
    """REFER's computeIoU, which X-VLM and ALBEF use: inclusive borders in the intersection, plain areas."""

    def inclusive(a, b):
        (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
        left, top = max(ax, bx), max(ay, by)
        right, bottom = min(ax + aw - 1, bx + bw - 1), min(ay + ah - 1, by + bh - 1)
        inside = (right - left + 1) * (bottom - top + 1) if left < right and top < bottom else 0
        return inside / (aw * ah + bw * bh - inside)

    generator = torch.Generator().manual_seed(0)
    corner, size = 20 * torch.rand(500, 2, 2, generator=generator), 5 + 30 * torch.rand(500, 2, 2, generator=generator)
    xywh, xyxy = torch.cat([corner, size], 2), torch.cat([corner, corner + size], 2)
    theirs = torch.tensor([inclusive(*pair) for pair in xywh.double().tolist()])
    ours = boxes.iou(xyxy[:, 0], xyxy[:, 1])
    least = (torch.minimum(xyxy[:, 0, 2:], xyxy[:, 1, 2:]) - torch.maximum(xyxy[:, 0, :2], xyxy[:, 1, :2])).amin(1)
    wide = least > 1
    torch.testing.assert_close(ours[wide], theirs[wide].float(), atol=1e-5, rtol=1e-4)
    assert (theirs[~wide] == 0).all() and (~wide).sum() > 50  # what overlaps by a pixel at most counts as apart there
    assert ((ours >= 0.5) == (theirs >= 0.5)).all() and (ours >= 0.5).sum() > 10


def test_overall_iou_weighs_by_area():
    """One tenth of the area found exactly, nothing of the rest: 0.1 overall, 0.5 per box (mean)."""
    predicted = torch.tensor([[0.0, 0, 10, 10], [0, 0, 0, 0]])
    target = torch.tensor([[0.0, 0, 10, 10], [0, 0, 30, 30]])
    assert metrics.overall_iou(predicted, target) == pytest.approx(0.1)
    assert metrics.mean_iou(predicted, target) == pytest.approx(0.5)


def test_any_box_and_merged_box_find_different_phrases():
    two = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
    one_of_them, around_both = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.0, 0, 30, 10]])
    assert metrics.phrase_grounding(one_of_them, [two]) == {"any_box_acc": 1.0, "merged_box_acc": 0.0}
    assert metrics.phrase_grounding(around_both, [two]) == {"any_box_acc": 0.0, "merged_box_acc": 1.0}


def test_phrase_grounding_on_random_boxes():
    generator = torch.Generator().manual_seed(0)

    def some(n):
        corner = torch.rand(n, 2, generator=generator)
        return torch.cat([corner, corner + 0.3 + torch.rand(n, 2, generator=generator)], 1)

    predicted = some(200)
    targets = [some(int(n)) for n in torch.randint(1, 4, (200,), generator=generator)]
    any_box = merged_box = 0
    for box, true in zip(predicted, targets, strict=True):
        any_box += any(boxes.iou(box, target).item() >= 0.5 for target in true)
        hull = torch.tensor([*true[:, :2].min(0).values, *true[:, 2:].max(0).values])
        merged_box += boxes.iou(box, hull).item() >= 0.5
    found = metrics.phrase_grounding(predicted, targets)
    assert 0 < any_box < 200  # the comparison is about something
    assert 0 < merged_box < 200
    assert found == {"any_box_acc": any_box / 200, "merged_box_acc": merged_box / 200}


def test_phrases_that_cannot_be_scored():
    box = torch.tensor([[0.0, 0, 1, 1]])
    with pytest.raises(ValueError, match=r"targets_xyxy\[0\]: no boxes"):
        metrics.phrase_grounding(box, [torch.zeros(0, 4)])
    with pytest.raises(ValueError, match="1 predicted boxes, but targets of 2"):
        metrics.phrase_grounding(box, [box, box])
    for score in (metrics.grounding_accuracy, metrics.mean_iou, metrics.overall_iou):
        with pytest.raises(ValueError, match="nothing to score"):
            score(torch.zeros(0, 4), torch.zeros(0, 4))


def test_choices_within_an_image():
    scores = [
        torch.tensor([[0.9, 0.8], [0.1, 0.2]]),  # both regions pick their text; text 1 picks region 0
        torch.tensor([[0.1, 0.9, 0.0], [0.2, 0.3, 0.0], [0.0, 0.0, 1.0]]),
    ]
    # second: region 0 picks text 1; text 0 picks region 1, text 1 picks region 0
    choice = metrics.choice_accuracy(scores)
    assert choice["region_to_text"] == pytest.approx(4 / 5)
    assert choice["text_to_region"] == pytest.approx(2 / 5)
    assert choice["chance"] == pytest.approx(2 / 5)


def test_equal_choices_are_worth_chance():
    choice = metrics.choice_accuracy([torch.zeros(n, n) for n in (1, 2, 5, 0)])
    assert choice == {key: pytest.approx(3 / 8) for key in ("region_to_text", "text_to_region", "chance")}


@pytest.mark.parametrize("matrix", [torch.zeros(2, 3), torch.tensor([[float("nan")]])])
def test_choices_that_cannot_be_scored(matrix):
    with pytest.raises(ValueError, match=r"scores\[1\]: expected a square matrix"):
        metrics.choice_accuracy([torch.zeros(1, 1), matrix])
    with pytest.raises(ValueError, match="nothing to score"):
        metrics.choice_accuracy([])


def test_presence_by_hand():
    probability = torch.tensor([0.9, 0.8, 0.3, 0.7, 0.1, 0.2])
    present = torch.tensor([True, True, True, False, False, False])
    found = metrics.presence(probability, present, 0.5, bins=2)
    assert found["n_acc"] == pytest.approx(2 / 3) and found["t_acc"] == pytest.approx(2 / 3)
    assert found["absent"] == 0.5
    # Below 0.5: 0.6 in all against one present; above: 2.4 against two.
    assert found["calibration_error"] == pytest.approx((abs(0.6 - 1) + abs(2.4 - 2)) / 6)
    with pytest.raises(ValueError, match="3 of 3 phrases have a target"):
        metrics.presence(probability[:3], present[:3], 0.5)


def test_generalized_grounding_by_hand():
    """Found; found by an IoU of 0.52; missed; denied; nothing there, and so said, and not said; one of two found."""
    box, near, far = [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 8.0, 6.5], [50.0, 50.0, 60.0, 60.0]
    targets = [[box], [near], [far], [box], [], [], [box, far]]
    said = torch.tensor([True, True, True, False, False, True, True])
    found = metrics.generalized_grounding(
        torch.tensor([box] * 7), said, [torch.tensor(each).reshape(-1, 4) for each in targets]
    )
    shares = {"f1_precision": 3 / 7, "f1_precision_giou": 3 / 7, "several": 1 / 7}
    assert found == {name: pytest.approx(value) for name, value in shares.items()}
    moved = torch.tensor([[1.7, 1.7, 11.7, 11.7]])  # IoU 0.5254, generalised 0.4832
    found = metrics.generalized_grounding(torch.tensor([box]), said[:1], [moved])
    assert (found["f1_precision"], found["f1_precision_giou"]) == (1.0, 0.0)


def test_where_the_heat_is_by_hand():
    heat = torch.zeros(2, 4)
    heat[0, 3], heat[1, 0], heat[1, 1] = 4.0, 2.0, -3.0
    right_half, corner = torch.tensor([0.5, 0.0, 1.0, 1.0]), torch.tensor([0.0, 0.75, 0.25, 1.0])
    assert metrics.pointing(heat, right_half) == 1.0 and metrics.pointing(heat, corner) == 0.0
    assert metrics.energy_in_box(heat, right_half) == pytest.approx(4 / 6)
    assert metrics.energy_in_box(heat, corner) == pytest.approx(1 / 6)  # half of the cell of 2
    even = torch.ones(2, 4)
    assert metrics.pointing(even, right_half) == metrics.energy_in_box(even, right_half) == 0.5
    assert metrics.pointing(0 * even, right_half) == metrics.energy_in_box(0 * even, right_half) == 0.0
