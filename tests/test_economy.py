"""Gradient checkpointing, bfloat16 and torch.compile: the same losses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from xvlm.models.economy import checkpoint_layers
from xvlm.models.vision import VisionConfig
from xvlm.tasks.pretraining import PretrainingConfig, Task

VIT = VisionConfig(
    trunk="vit_tiny_patch16_224",
    options={"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2},
    image_size=(32, 32),
    local_layers=2,
)
TOWERS = {"swin": tiny.VISION, "vit with local layers": VIT}
SEQUENCER = VisionConfig(
    trunk="sequencer2d_s",
    options={"layers": (1,) * 4, "embed_dims": (8,) * 4, "hidden_sizes": (4,) * 4},
    image_size=(28, 28),
)


def task_of(vision: VisionConfig) -> Task:
    text = tiny.TEXT.model_copy(update={"dropout": 0.1})
    return Task(PretrainingConfig(), tiny.model(tiny.CONFIG.model_copy(update={"vision": vision, "text": text})))


def step(task: Task, *, train: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """Losses, gradients, and bytes that were kept for the backward pass."""
    torch.manual_seed(0)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = task.train(train)({"region": tiny.batch()})
    bytes_kept = sum(kept.values())
    sum(found.values()).backward()
    gradients = {name: p.grad for name, p in task.named_parameters()}
    return {name: loss.detach() for name, loss in found.items()}, gradients, bytes_kept


@pytest.mark.parametrize("tower", TOWERS)
def test_gradient_checkpointing_changes_memory_alone(tower):
    plain, economical = task_of(TOWERS[tower]), task_of(TOWERS[tower])
    checkpoint_layers(economical)
    assert economical.state_dict().keys() == plain.state_dict().keys()
    expected, gradients, before = step(plain, train=True)  # with dropout, which must fall the same way twice
    found, again, after = step(economical, train=True)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    torch.testing.assert_close(again, gradients, atol=1e-6, rtol=1e-5)
    assert after < 0.7 * before


def test_a_trunk_that_cannot_be_checkpointed_is_named():
    with pytest.raises(ValueError, match="gradient_checkpointing: timm does not have it for sequencer2d_s"):
        checkpoint_layers(task_of(SEQUENCER))


@pytest.mark.parametrize("tower", TOWERS)
def test_bfloat16_losses_are_near(tower, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda dice: dice.fill_(1))  # the same negatives
    expected, gradients, _ = step(task_of(TOWERS[tower]), train=False)
    with torch.autocast("cpu", torch.bfloat16):
        found, rough, _ = step(task_of(TOWERS[tower]), train=False)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    assert {gradient.dtype for gradient in rough.values()} == {torch.float32}
    exact, near = (torch.cat([g.flatten() for g in each.values()]) for each in (gradients, rough))
    assert torch.nn.functional.cosine_similarity(exact, near, dim=0) > 0.99


def compiled(tower: str, *options: str) -> dict:
    """What ``compiled.py`` prints. In a process of its own: the shape checks around every function here are no part of
    what is compiled.
    """
    run = subprocess.run(
        [sys.executable, "compiled.py", TOWERS[tower].model_dump_json(), *options],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("tower", TOWERS)
def test_compiled_encoders_have_no_breaks_and_do_not_compile_again_each_step(tower, checkpointed):
    found = compiled(tower, *["checkpoint"] * checkpointed)
    assert found["breaks"] == {}
    assert max(found["losses"], found["gradients"]) < 1e-4
    # The trunk, self-attention of all words and of those asked for, cross-attention, feed-forward; then no more.
    assert found["graphs"] == [5] * len(found["graphs"])


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a C++ compiler is at work
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("tower", TOWERS)
def test_compiled_losses_are_those_of_plain_float32(tower):
    exact = compiled(tower, "inductor")
    assert max(exact["losses"], exact["gradients"]) < 1e-4
    assert compiled(tower, "inductor", "checkpoint", "bf16")["losses"] < 0.02
