"""How sure an answer is: closed forms of the fit, and evidence from the image and from the box."""

import pytest
import tiny
import torch

from xvlm.config import ConfigError
from xvlm.grounder import Method
from xvlm.presence import Presence, WithPresence, _threshold, fit, log_odds
from xvlm.tasks.pretraining import PretrainingConfig, Task


def drawn(count: int = 4000):
    """Log-odds for which the true weights are known."""
    generator = torch.Generator().manual_seed(0)
    odds = 3 * torch.randn(count, 2, generator=generator)
    present = torch.rand(count, generator=generator) < (0.5 * odds[:, 0] + 1.0 * odds[:, 1] - 0.7).sigmoid()
    return odds, present


def test_the_fit_finds_the_weights_that_made_the_phrases():
    found = fit(*drawn())
    assert (found.image, found.region, found.bias) == pytest.approx((0.5, 1.0, -0.7), abs=0.12)


def test_the_fit_is_a_stationary_point_and_calibrated_on_what_it_saw():
    odds, present = drawn(500)
    error = fit(odds, present).probability(odds.double()) - present.double()
    assert float(error.mean()) == pytest.approx(0, abs=1e-4)
    assert (error[:, None] * odds).mean(0).abs().max() < 2e-2


def test_phrases_that_can_be_told_apart_are_and_one_kind_is_refused():
    odds = torch.tensor([[-3.0, 0.1], [-2.0, -0.1], [1.0, 0.0], [4.0, 0.2]])
    present = torch.tensor([False, False, True, True])
    found = fit(odds, present)
    assert ((found.probability(odds) >= found.threshold) == present).all()
    assert all(abs(value) < 100 for value in (found.image, found.region, found.bias))
    with pytest.raises(ValueError, match="4 of 4 phrases have a target; both kinds are needed"):
        fit(odds, torch.ones(4, dtype=torch.bool))


def test_the_threshold_weighs_both_kinds_alike_however_many_there_are():
    probability = torch.tensor([0.1, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9])
    present = torch.tensor([False, True, True, True, True, True, True])
    assert _threshold(probability, present) == pytest.approx(0.15)
    assert _threshold(probability, ~present) == 1.0 or _threshold(probability, ~present) == 0.0


def test_evidence_is_what_the_matching_head_says_of_image_and_box():
    model, batch = tiny.model(), tiny.batch(images=2, per_image=3)
    boxes_xyxy = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.5, 0.25, 1.0, 1.0]]).repeat(3, 1)
    odds = log_odds(model, batch.texts, model.encode_image(batch.images), batch.regions.image, boxes_xyxy)
    logits = model.match(model.fuse(model.encode_text(batch.texts), model.encode_image(batch.images),
                                    batch.regions.image))  # fmt: skip
    torch.testing.assert_close(odds[:, 0], logits[:, 1] - logits[:, 0])
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(6, 4)
    same = log_odds(model, batch.texts, model.encode_image(batch.images), batch.regions.image, whole)
    torch.testing.assert_close(same[:, 0], same[:, 1])  # a box that covers the image is the image
    assert (odds[:, 0] - odds[:, 1]).abs().max() > 1e-3


def test_a_method_with_presence_answers_as_before_and_says_how_sure():
    model, batch = tiny.model(), tiny.batch(images=2, per_image=3)
    method = Task(PretrainingConfig(), model)
    sure = WithPresence(method, model, Presence(image=0.0, region=0.0, bias=0.0, threshold=0.5))
    assert isinstance(sure, Method)
    with torch.no_grad():
        before = method.ground(batch.texts, method.encode(batch.images), batch.regions.image)
        after = sure.ground(batch.texts, sure.encode(batch.images), batch.regions.image)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a.boxes_xyxy, b.boxes_xyxy) and b.presence == 0.5


def test_it_is_stored_with_the_weights_and_with_no_others(tmp_path):
    assert Presence.from_pretrained(tmp_path) is None
    model, presence = tiny.model(), Presence(image=0.5, region=0.25, bias=-1.0, threshold=0.4)
    model.save_pretrained(tmp_path)
    presence.save_pretrained(tmp_path)
    found = Presence.from_pretrained(tmp_path)
    assert found.model_copy(update={"weights": ""}) == presence and found.weights
    model.save_pretrained(tmp_path)
    assert Presence.from_pretrained(tmp_path) == found  # the same weights again
    with torch.no_grad():
        model.itm_head[0].bias[0] += 1
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"presence\.json: is about other weights than model\.safetensors beside it"):
        Presence.from_pretrained(tmp_path)
    (tmp_path / "presence.json").write_text('{"image": 0.5, "region": 0.25, "bias": "much", "threshold": 0.4}')
    with pytest.raises(ConfigError, match=r"presence.json: bias: .* \(found 'much'\)"):
        Presence.from_pretrained(tmp_path)
