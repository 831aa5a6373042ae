"""Retrieval gives the reference's losses, gradients, re-ranked scores and recalls."""

import pytest
import torch
from reference import Golden, whole_images

from xvlm import evaluate, losses, metrics
from xvlm.models.xvlm import XVLM
from xvlm.tasks.retrieval import RetrievalConfig, Task
from xvlm.types import Batch, Texts

GOLDENS = {"golden": ("retrieval_swin",)}
HEADS = ("image_projection", "text_projection", "temperature", "itm_head")


@pytest.fixture(scope="module")
def model(golden) -> XVLM:
    return golden.xvlm(HEADS)


def batch_of(golden: Golden) -> Batch:
    given = golden.inputs
    texts = Texts(given["text_ids"], given["text_atts"].bool())
    regions = whole_images(len(given["idx"]), golden.size)
    return Batch(given["image"], texts, regions, ids=tuple(map(str, given["idx"].tolist())))


def test_losses_and_gradients(golden, model, monkeypatch):
    given = golden.inputs
    row, logits, draw, match = torch.arange(len(given["idx"])), [], [], losses.matching

    def drawn(*arguments):
        draw.append(arguments)
        return row, given["image_neg_idx"], row, given["text_neg_idx"]

    monkeypatch.setattr(losses, "hard_negatives", drawn)
    monkeypatch.setattr(losses, "matching", lambda found, right: (logits.append(found), match(found, right))[1])
    model.zero_grad()
    found = Task(RetrievalConfig(), model)({"caption": batch_of(golden)})
    assert found.keys() == {"caption/itc", "caption/itm"}
    golden.loss("loss_itc", found["caption/itc"])
    golden.loss("loss_itm", found["caption/itm"])
    total = sum(found.values())
    golden.loss("loss", total)
    golden.close("itm_logits", logits[0])
    for name, weights in zip(("t2i", "i2t"), losses.negative_weights(*draw[0]), strict=True):
        golden.close(f"neg_weights_{name}", weights)
    total.backward()
    golden.gradients(model)


def test_scores_and_recalls_with_reranking(golden, model):
    given, candidates = golden.inputs, golden.config["k_test"]
    of = torch.tensor([golden.manifest["eval_txt2img"][str(i)] for i in range(len(given["eval_text_ids"]))])
    with torch.inference_mode():
        gallery = model.encode_image(given["eval_image"])
        words = model.encode_text(Texts(given["eval_text_ids"], given["eval_text_atts"].bool()))
    _, by_image, by_text = evaluate.rank(model, gallery, words, candidates)
    directions = {"image_to_text": ("i2t", "txt", by_image), "text_to_image": ("t2i", "img", by_text.T)}
    for direction, (name, short, scores) in directions.items():
        golden.close(f"eval_score_{name}", scores.masked_fill(scores == -torch.inf, -100))
        reference = {k: golden.manifest["eval_result"][f"{short}_r{k}"] for k in (1, 5, 10)}
        # Behind the candidates the reference counts on through the others, in whatever order a sort left them; we count
        # them as not found. The two must agree up to there, and beyond, ours is what is certainly found.
        found = metrics.recall_at_k(scores if name == "i2t" else scores.T, of)
        for k, theirs in reference.items():
            ours = 100 * found[f"{direction}_r{k}"]
            assert ours == pytest.approx(theirs) if k <= candidates else ours <= theirs + 1e-9
