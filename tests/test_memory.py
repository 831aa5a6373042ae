"""Memory of an update: counted right, along a line, and what fits a card."""

import json

import pytest
import torch
from typer.testing import CliRunner

from xvlm.__main__ import app
from xvlm.bench import memory
from xvlm.bench.step import SIZES
from xvlm.models.xvlm import XVLM
from xvlm.tasks.pretraining import PretrainingConfig, Task

GIB = 2**30


def counted(batches: tuple[int, int]) -> memory.Memory:
    def task(model: XVLM) -> Task:
        return Task(PretrainingConfig(), model)

    return memory.bench_memory("tiny", task, device="cpu", precision="bf16", batches=batches)


@pytest.fixture(scope="module")
def found() -> memory.Memory:
    return counted((4, 8))


def test_two_batches_tell_what_a_larger_one_needs():
    task = Task(PretrainingConfig(), XVLM(SIZES["tiny"])).train()
    for parameter in task.parameters():
        parameter.grad = torch.zeros_like(parameter)
    lines = [
        memory._need(task, "tiny", "caption", False, batches, torch.device("cpu"), "fp32")
        for batches in ((8, 24), (24, 40))
    ]
    expected, told = (line.base + 40 * line.per_image for line in lines)
    assert told == pytest.approx(expected, rel=0.1)


def test_checkpointing_saves_and_both_updates_together_cost_more(found):
    caption, region, joint, *checkpointed = found.needs
    assert [need.update for need in found.needs] == ["caption", "region", "joint"] * 2
    assert not any(need.checkpointed for need in (caption, region, joint))
    assert joint.per_image == caption.per_image + 48 / 128 * region.per_image
    for need, less in zip((caption, region, joint), checkpointed, strict=True):
        assert less.checkpointed and less.per_image < 0.6 * need.per_image


def test_the_largest_batch_fits_and_one_more_does_not(found):
    assert found.parameters == sum(p.numel() for p in XVLM(SIZES["tiny"]).parameters())
    for need in found.needs:
        for card in memory.CARDS:
            images = found.images(need, card)
            used = [16 * found.parameters + need.base + n * need.per_image for n in (images, images + 1)]
            assert used[0] <= 0.9 * card * GIB < used[1]
    big = memory.Memory("huge", "fp32", "cpu", 10**9, False, [memory.Need("caption", False, 0.0, 1e6)])
    assert big.images(big.needs[0], 12) == 0


def test_norms_are_in_float32_as_on_a_gpu():
    norm = torch.nn.LayerNorm(4)
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
        norm.register_forward_pre_hook(memory._as_on_a_gpu)
        assert norm(x).dtype == torch.float32


def test_the_command_prints_a_table(tmp_path, found, monkeypatch):
    given = {}
    monkeypatch.setattr(memory, "bench_memory", lambda *_, **options: given.update(options) or found)
    asked = ["bench", "memory", "--size", "tiny", "--precision", "fp32", "--batches", "4", "8"]
    printed = CliRunner().invoke(app, [*asked, "--json", str(tmp_path / "memory.json")])
    assert printed.exit_code == 0, printed.output
    assert given == {"device": "cpu", "precision": "fp32", "batches": (4, 8)}
    assert "computed from the tensors alive on cpu" in printed.output
    assert (
        len([line for line in printed.output.splitlines() if line.startswith(("| caption", "| region", "| joint"))])
        == 6
    )
    assert json.loads((tmp_path / "memory.json").read_text())["measured"] is False


def test_batches_that_give_no_line_are_an_error():
    for batches in ((1, 4), (4, 4), (8, 4)):
        with pytest.raises(ValueError, match="expected two different numbers of images, the smaller first"):
            counted(batches)
