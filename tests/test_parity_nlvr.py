"""NLVR2 and its text assignment give the reference's logits, losses and gradients."""

import pytest
import torch
from test_parity import Golden, close, same_gradients, same_loss

from xvlm.tasks import nlvr
from xvlm.tasks.nlvr import Assignment, NlvrConfig, Statements, Task
from xvlm.types import Batch, Regions, Texts


@pytest.fixture
def golden(goldens) -> Golden:
    return Golden(goldens / "nlvr_swin", heads=("truth_head",), looks=2)


@pytest.fixture
def assignment(goldens) -> Golden:
    return Golden(goldens / "nlvr_pretrain_swin", heads=("image_projection", "assignment_head"), looks=2)


def texts_of(golden: Golden) -> Texts:
    return Texts(golden.inputs["text_ids"], golden.inputs["text_atts"].bool())


@pytest.mark.parametrize("name", ["golden", "assignment"])
def test_parameters(request, name):
    golden = request.getfixturevalue(name)
    assert sum(p.numel() for p in golden.model.parameters()) == golden.manifest["num_params"]
    for first, second in golden.manifest["tied_keys"]:  # we keep the first alone
        assert torch.equal(golden.state[first], golden.state[second])


def test_statements(golden):
    count = len(golden.inputs["targets"])
    about = torch.stack([torch.arange(count), count + torch.arange(count)], 1)  # all first images, then all second
    batch = Statements(golden.inputs["image"], texts_of(golden), about, golden.inputs["targets"].bool())
    task, model = Task(NlvrConfig(), golden.model), golden.model
    fused = model.fuse(model.encode_text(batch.texts), model.encode_image(batch.images), about)
    close(fused.first, golden.outputs["cls"])
    close(task.judge(batch), golden.outputs["logits"])
    close(task.predict(batch), golden.outputs["logits"].softmax(-1)[:, 1])
    found = task({"nlvr": batch})
    same_loss(found["nlvr/truth"], golden.outputs["loss"])
    found["nlvr/truth"].backward()
    same_gradients(golden.gradients(), golden.manifest["grads"])


def test_assignment(assignment, monkeypatch):
    """Draws are fixed: a uniform number says one other image or two for a text, then one their order."""
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
    whole = torch.tensor([[0.5, 0.5, 1.0, 1.0]]).repeat(len(own), 1)
    regions = Regions(own, whole, whole * assignment.size, torch.ones(len(own), dtype=torch.bool))
    batch = Batch(assignment.inputs["image"], texts_of(assignment), regions)
    task = Assignment(NlvrConfig(), assignment.model)
    about, answer = nlvr.arrange(own, others, chances, task.config.neither)
    close(task.assign(batch.texts, assignment.model.encode_image(batch.images), about), assignment.outputs["logits"])
    found = task({"caption": batch})
    same_loss(found["caption/assignment"], assignment.outputs["loss"])
    found["caption/assignment"].backward()
    same_gradients(assignment.gradients(), assignment.manifest["grads"])
    assert set(assignment.manifest["grads_none"]) == {"vision_proj.weight", "vision_proj.bias"}
    predicted = task.predict(Statements(batch.images, batch.texts, about, answer == 0))
    close(predicted, assignment.outputs["logits"].softmax(-1))
