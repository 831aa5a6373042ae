"""Losses against closed forms and brute force."""

import math

import pytest
import torch
import torch.nn.functional as F

from xvlm import losses
from xvlm.tasks.pretraining import same_places, same_texts
from xvlm.types import Regions, Texts


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def test_contrastive_of_equal_features_is_chance():
    same = torch.ones(5, 4) / 2
    loss = losses.contrastive(same, same, torch.tensor(0.07))
    assert float(loss) == pytest.approx(math.log(5), abs=1e-5)


def test_contrastive_shares_the_target_among_positives():
    image, text, temperature = unit(4, 8), unit(4, 8), torch.tensor(0.5)
    same = torch.tensor([0, 1, 0, 2])
    logits = image @ text.T / 0.5
    expected = 0.0
    for scores in (logits, logits.T):
        log_p = scores.log_softmax(1)
        for i in range(4):
            positives = [j for j in range(4) if same[j] == same[i]]
            expected -= sum(log_p[i, j] for j in positives) / len(positives) / 8
    torch.testing.assert_close(losses.contrastive(image, text, temperature, same[:, None]), expected)


def test_contrastive_without_repeats_is_the_diagonal():
    image, text, temperature = unit(4, 8), unit(4, 8), torch.tensor(0.07)
    plain = losses.contrastive(image, text, temperature)
    torch.testing.assert_close(losses.contrastive(image, text, temperature, torch.arange(4)[:, None]), plain)


def test_hard_negatives_are_never_forbidden_and_prefer_the_similar():
    image = text = unit(6, 3)
    forbidden = torch.eye(6, dtype=torch.bool)
    forbidden[0, 1] = forbidden[1, 0] = True
    drawn = torch.zeros(6, 6)
    for _ in range(300):
        texts, wrong_image, images, wrong_text = losses.hard_negatives(image, text, torch.tensor(0.2), forbidden)
        assert not forbidden[wrong_image, texts].any() and not forbidden[images, wrong_text].any()
        drawn[texts, wrong_image] += 1
    weights, _ = losses.negative_weights(image, text, torch.tensor(0.2), forbidden)
    torch.testing.assert_close(drawn / 300, weights / weights.sum(1, keepdim=True), atol=0.1, rtol=0)


def test_negatives_of_a_group_do_not_depend_on_what_else_is_there():
    image, text, temperature = unit(9, 8), unit(9, 8), torch.tensor(0.3)
    groups = torch.tensor([4, 4, 4, 4, 7, 7, 7, 8, 8])
    texts, wrong_image, images, wrong_text = losses.hard_negatives(image, text, temperature, None, groups)
    assert torch.equal(groups[texts], groups[wrong_image]) and torch.equal(groups[images], groups[wrong_text])
    for rows in (slice(0, 4), slice(4, 9)):
        part = losses.hard_negatives(image[rows], text[rows], temperature, None, groups[rows])
        assert torch.equal(part[1] + rows.start, wrong_image[rows]) and torch.equal(
            part[3] + rows.start, wrong_text[rows]
        )
    drawn = torch.zeros(4, 4)
    for number in range(400):
        texts, wrong_image, _, _ = losses.hard_negatives(
            image[:4], text[:4], temperature, None, torch.full((4,), number)
        )
        drawn[texts, wrong_image] += 1
    weights, _ = losses.negative_weights(image[:4], text[:4], temperature, torch.eye(4, dtype=torch.bool))
    torch.testing.assert_close(drawn / 400, weights / weights.sum(1, keepdim=True), atol=0.1, rtol=0)


def test_sigmoid_contrast_asks_of_every_pair_alone():
    image, text, temperature, bias = unit(4, 8), unit(4, 8), torch.tensor(0.1), torch.tensor(-3.0)
    same = torch.tensor([0, 1, 0, 2])
    expected = 0.0
    for i in range(4):
        for j in range(4):
            logit = image[i] @ text[j] / temperature + bias
            expected += torch.log1p(torch.exp(-logit if same[i] == same[j] else logit)) / 4
    found = losses.sigmoid_contrastive(image, text, temperature, bias, same[:, None])
    torch.testing.assert_close(found, expected)
    alone = losses.sigmoid_contrastive(image, text, temperature, bias)
    torch.testing.assert_close(
        alone, losses.sigmoid_contrastive(image, text, temperature, bias, torch.arange(4)[:, None])
    )


def test_rows_without_a_negative_are_left_out():
    image = text = unit(3, 4)
    forbidden = torch.ones(3, 3, dtype=torch.bool)
    assert all(len(rows) == 0 for rows in losses.hard_negatives(image, text, torch.tensor(0.1), forbidden))
    forbidden[0, 2] = False
    texts, wrong_image, images, wrong_text = losses.hard_negatives(image, text, torch.tensor(0.1), forbidden)
    assert (texts.tolist(), wrong_image.tolist(), images.tolist(), wrong_text.tolist()) == ([2], [0], [0], [2])


def test_box_losses_closed_form():
    predicted, target = torch.tensor([[0.5, 0.5, 0.2, 0.2]]), torch.tensor([[0.6, 0.5, 0.2, 0.2]])
    l1, giou = losses.box_l1_giou(predicted, target)
    assert float(l1) == pytest.approx(0.1, abs=1e-6)
    assert float(giou) == pytest.approx(2 / 3, abs=1e-6)


def test_losses_of_nothing_are_zero_and_finite():
    none = torch.zeros(0, 4, requires_grad=True)
    l1, giou = losses.box_l1_giou(none, torch.zeros(0, 4))
    words = losses.masked_words(torch.zeros(0, 7, requires_grad=True), torch.zeros(0, dtype=torch.long))
    assert float(l1) == float(giou) == float(words) == 0.0


def test_equal_words_are_the_same_text_whatever_the_padding():
    ids = torch.tensor([[2, 7, 9, 0], [2, 7, 9, 5], [2, 9, 7, 0], [2, 7, 9, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]]).bool()
    same = same_texts(Texts(ids, mask))
    assert same[0] == same[3] and len(set(same.tolist())) == 3
    reversed_relation = torch.tensor([[2, 19, 111, 60, 93, 37], [2, 93, 37, 60, 19, 111]])
    assert len(set(same_texts(Texts(reversed_relation, reversed_relation > 0)).tolist())) == 2
    wider = same_texts(Texts(F.pad(ids, (0, 3)), F.pad(mask, (0, 3))))
    assert torch.equal(same, wider)


def test_places_are_the_same_where_image_and_box_are():
    boxes_xywh = torch.tensor([[0, 0, 9, 9], [0, 0, 9, 9], [0, 0, 9, 9.5], [0, 0, 9, 9]], dtype=torch.float64)
    whole = torch.zeros(4, dtype=torch.bool)
    same = same_places(Regions(torch.tensor([0, 0, 0, 1]), boxes_xywh, boxes_xywh, whole)).tolist()
    assert same[0] == same[1] and len(set(same)) == 3


def test_pairs_that_agree_in_either_way_share_the_target():
    """Texts 0 and 1 have equal words, texts 1 and 2 are about one place; 3 stands alone."""
    same = torch.tensor([[7, 0], [7, 1], [8, 1], [9, 2]])
    assert losses.matches(same).int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    features = torch.eye(4)
    loss = losses.contrastive(features, features, torch.tensor(1.0), same)
    log_z = torch.log(torch.tensor(3 + torch.e))
    on_the_diagonal = torch.tensor([1 / 2, 1 / 3, 1 / 2, 1])  # of each row's target; all other logits are 0
    torch.testing.assert_close(loss, (log_z - on_the_diagonal).mean())


def test_smoothing_takes_from_the_word_and_gives_all_others_a_little_less():
    logits, words = torch.randn(3, 5), torch.tensor([0, 4, 2])
    target = torch.full((3, 5), 0.1 / 5)
    target[torch.arange(3), words] = 0.9
    expected = -(target * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(losses.next_words(logits, words, 0.1), expected)
    torch.testing.assert_close(losses.captions(logits, words, 0.1), expected.mean())
    torch.testing.assert_close(losses.captions(logits, words), F.cross_entropy(logits, words))
