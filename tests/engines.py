"""Runs under whatever engine it was launched with: straight, and cut and continued. ``launch engines.py OUT [STATE]``.

Prints, from the first process, the engine and whether the weights are divided; leaves the final weights of both in OUT.
With STATE, a folder of another run's state, a third run continues from it.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import tiny
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from xvlm import distributed, train
from xvlm.optim import OptimConfig
from xvlm.tasks.pretraining import PretrainingConfig, Task

out, state = Path(sys.argv[1]), sys.argv[2:]
EMA = None if "no-ema" in state else 0.5
CONFIG = train.TrainConfig(steps=4, save_every=2, log_every=1, keep=9, ema=EMA)
OPTIM = OptimConfig(lr=1e-2, warmup=1)
if "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED")):
    # accelerate has these engines for GPUs only. torch has them for the CPU as well, so it is told what it wants to hear.
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    os.environ.pop("ACCELERATE_USE_CPU", None)
    train.Accelerator = lambda **given: Accelerator(**given | {"cpu": False})
accelerator = train.make_accelerator(CONFIG, out)
rank = distributed.world().rank


def batches(start: int):
    while True:
        yield tiny.batch(seed=10 * start + rank, images=2 + rank)
        start += 1


def run(name: str) -> None:
    text = tiny.TEXT.model_copy(update={"dropout": 0.1})
    task = Task(PretrainingConfig(), tiny.model(tiny.CONFIG.model_copy(update={"text": text})))
    (out / name).mkdir(parents=True, exist_ok=True)
    train.fit(task, {"region": batches}, CONFIG, OPTIM, out / name, accelerator)
    if rank == 0:
        torch.save(task.state_dict(), out / f"{name}.pt")
    distributed.wait_for_everyone()


divided = []
prepare = accelerator.prepare


def watched(model, optimizer):
    prepared = prepare(model, optimizer)
    divided.append(sum(isinstance(p, DTensor) for p in prepared[0].parameters()))
    return prepared


accelerator.prepare = watched
run("straight")
if rank == 0:
    (out / "cut/state").mkdir(parents=True)
    shutil.copytree(out / "straight/state/00000002", out / "cut/state/00000002")
distributed.wait_for_everyone()
run("cut")
if rank == 0:
    print(json.dumps({"engine": str(accelerator.distributed_type.value), "divided": divided}))
