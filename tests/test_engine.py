"""FSDP2 and DeepSpeed train as DDP does and continue to the bit; which parameters learn at which rate."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def launch(engine: str, out: Path, *runs: str, **environment: str) -> dict:
    """What ``engines.py`` prints, on two processes without a GPU."""
    config = ["--config_file", str(ROOT / f"configs/accelerate/{engine}.yaml")]
    gpus = [] if engine == "demo" else ["--num_processes", "2"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *config, *gpus, "engines.py", str(out), *runs]
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment
    process = subprocess.run(
        command, cwd=Path(__file__).parent, env=os.environ | settings, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.strip().splitlines()[-1])


def weights(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # four launches
def test_divided_weights_train_as_whole_ones_do_and_continue_to_the_bit(tmp_path):
    assert launch("demo", tmp_path / "ddp", "straight", ACCELERATE_USE_CPU="true")["divided"] == [0]
    told = launch("fsdp2", tmp_path / "fsdp", "straight", "cut")
    assert told["engine"] == "FSDP" and min(told["divided"]) > 100
    straight = weights(tmp_path / "fsdp/straight.pt")
    assert same(weights(tmp_path / "fsdp/cut.pt"), straight)
    whole = weights(tmp_path / "ddp/straight.pt")
    torch.testing.assert_close(straight, whole, rtol=1e-5, atol=1e-6)
    shutil.copytree(tmp_path / "fsdp/straight", tmp_path / "changed/straight")
    launch("demo", tmp_path / "changed", "cut", ACCELERATE_USE_CPU="true")  # a state of one engine under another
    torch.testing.assert_close(weights(tmp_path / "changed/cut.pt"), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # on a CPU it compiles its own communication first
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeed_continues_to_the_bit(tmp_path):
    for run in ("straight", "cut"):  # it does not train twice in one process
        assert launch("deepspeed_zero2", tmp_path, run, DS_ACCELERATOR="cpu")["engine"] == "DEEPSPEED"
    assert same(weights(tmp_path / "cut.pt"), weights(tmp_path / "straight.pt"))
