"""NLVR2 and its text assignment give the reference's logits, losses and gradients."""

import pytest
import torch
from reference import Golden, whole_images

from xvlm.tasks import nlvr
from xvlm.tasks.nlvr import Assignment, NlvrConfig, Statements, Task
from xvlm.types import Batch, Texts

GOLDENS = {"golden": ("nlvr_swin",), "assignment": ("nlvr_pretrain_swin",)}


@pytest.fixture(scope="module")
def assignment(request) -> Golden:
    return Golden(request.param)


def texts_of(golden: Golden) -> Texts:
    return Texts(golden.inputs["text_ids"], golden.inputs["text_atts"].bool())


def test_statements(golden):
    model = golden.xvlm(heads=("truth_head",), looks=2)
    count = len(golden.inputs["targets"])
    about = torch.stack([torch.arange(count), count + torch.arange(count)], 1)  # all first images, then all second
    batch = Statements(golden.inputs["image"], texts_of(golden), about, golden.inputs["targets"].bool())
    task = Task(NlvrConfig(), model)
    fused = model.fuse(model.encode_text(batch.texts), model.encode_image(batch.images), about)
    golden.close("cls", fused.first)
    golden.close("logits", task.judge(batch))
    torch.testing.assert_close(task.predict(batch), golden.outputs["logits"].softmax(-1)[:, 1], atol=1e-5, rtol=0)
    (loss,) = task({"nlvr": batch}).values()
    golden.loss("loss", loss)
    loss.backward()
    golden.gradients(model)


def test_assignment(assignment, monkeypatch):
    """Draws are fixed: a uniform number says one other image or two for a text, then one their order."""
    model = assignment.xvlm(heads=("image_projection", "assignment_head"), looks=2)
    chances, numbers = torch.zeros(len(assignment.inputs["image"]), 2), iter(assignment.manifest["uniforms"])
    others = torch.zeros(len(chances), 2, dtype=torch.long)
    for text, drawn in enumerate(assignment.manifest["draws"]):
        chances[text, 0] = next(numbers)
        if isinstance(drawn, list):
            others[text] = torch.tensor(drawn)
        else:
            others[text, 0], chances[text, 1] = drawn, next(numbers)
    assert next(numbers, None) is None
    monkeypatch.setattr(nlvr, "draw_others", lambda *_: others)
    monkeypatch.setattr(torch, "rand", lambda *_: chances)

    own = torch.arange(len(others))
    batch = Batch(assignment.inputs["image"], texts_of(assignment), whole_images(len(own), assignment.size))
    task = Assignment(NlvrConfig(), model)
    about, answer = nlvr.arrange(own, others, chances, task.config.neither)
    assignment.close("logits", task.assign(batch.texts, model.encode_image(batch.images), about))
    (loss,) = task({"caption": batch}).values()
    assignment.loss("loss", loss)
    loss.backward()
    assignment.gradients(model)
    predicted = task.predict(Statements(batch.images, batch.texts, about, answer == 0))
    torch.testing.assert_close(predicted, assignment.outputs["logits"].softmax(-1), atol=1e-5, rtol=0)
