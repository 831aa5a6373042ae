"""Retrieval gives the reference's losses, gradients, re-ranked scores and recalls."""

import pytest
import torch
from test_parity import Golden, close, same_gradients, same_loss

from xvlm import evaluate, losses, metrics
from xvlm.tasks.retrieval import RetrievalConfig, Task
from xvlm.types import Batch, Regions, Texts

HEADS = ("image_projection", "text_projection", "temperature", "itm_head")


@pytest.fixture
def golden(goldens) -> Golden:
    return Golden(goldens / "retrieval_swin", heads=HEADS)


def batch_of(golden: Golden) -> Batch:
    given = golden.inputs
    count = len(given["idx"])
    whole = torch.tensor([[0.5, 0.5, 1.0, 1.0]]).repeat(count, 1)
    regions = Regions(torch.arange(count), whole, whole * golden.size, torch.ones(count, dtype=torch.bool))
    texts = Texts(given["text_ids"], given["text_atts"].bool())
    return Batch(given["image"], texts, regions, ids=tuple(map(str, given["idx"].tolist())))


def test_parameter_count(golden):
    assert sum(p.numel() for p in golden.model.parameters()) == golden.manifest["num_params"]


def test_losses_and_gradients(golden, monkeypatch):
    given, expected = golden.inputs, golden.outputs
    assert len(set(given["idx"].tolist())) < len(given["idx"])
    row, logits, draw, match = torch.arange(len(given["idx"])), [], [], losses.matching

    def drawn(*arguments):
        draw.append(arguments)
        return row, given["image_neg_idx"], row, given["text_neg_idx"]

    monkeypatch.setattr(losses, "hard_negatives", drawn)
    monkeypatch.setattr(losses, "matching", lambda found, right: (logits.append(found), match(found, right))[1])
    found = Task(RetrievalConfig(), golden.model)({"caption": batch_of(golden)})
    assert found.keys() == {"caption/itc", "caption/itm"}
    same_loss(found["caption/itc"], expected["loss_itc"])
    same_loss(found["caption/itm"], expected["loss_itm"])
    total = sum(found.values())
    same_loss(total, expected["loss"])
    close(logits[0], expected["itm_logits"])
    for name, weights in zip(("t2i", "i2t"), losses.negative_weights(*draw[0]), strict=True):
        close(weights, expected[f"neg_weights_{name}"], name)
    total.backward()
    same_gradients(golden.gradients(), golden.manifest["grads"])


def test_scores_and_recalls_with_reranking(golden):
    given, config = golden.inputs, golden.manifest["config"]
    of = torch.tensor([golden.manifest["eval_txt2img"][str(i)] for i in range(len(given["eval_text_ids"]))])
    with torch.inference_mode():
        gallery = golden.model.encode_image(given["eval_image"])
        words = golden.model.encode_text(Texts(given["eval_text_ids"], given["eval_text_atts"].bool()))
    _, by_image, by_text = evaluate.rank(golden.model, gallery, words, config["k_test"])
    numbers = {}
    for name, direction, scores in (("i2t", "image_to_text", by_image), ("t2i", "text_to_image", by_text.T)):
        expected = golden.outputs[f"eval_score_{name}"]
        assert torch.equal(scores == -torch.inf, expected == -100)
        close(scores.masked_fill(scores == -torch.inf, -100), expected, name)
        # Behind the candidates the reference counts on through the others, last first; we count them as not found.
        behind = torch.arange(scores.shape[1]) / 1000 - 100
        scores = torch.where(scores == -torch.inf, behind, scores)
        recalls = metrics.recall_at_k(scores if name == "i2t" else scores.T, of)
        numbers |= {key: value for key, value in recalls.items() if key.startswith(direction)}
    theirs = {"image_to_text": "txt", "text_to_image": "img"}
    for direction, name in theirs.items():
        for k in (1, 5, 10):
            recall = golden.manifest["eval_result"][f"{name}_r{k}"]
            assert 100 * numbers[f"{direction}_r{k}"] == pytest.approx(recall)
    ours = metrics.recall_at_k(by_image, of), metrics.recall_at_k(by_text, of)
    assert 100 * ours[0]["image_to_text_r1"] == pytest.approx(golden.manifest["eval_result"]["txt_r1"])
    assert 100 * ours[1]["text_to_image_r1"] == pytest.approx(golden.manifest["eval_result"]["img_r1"])
