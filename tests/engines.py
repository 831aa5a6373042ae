"""Training under whatever engine it was launched with: ``accelerate launch … engines.py OUT RUN …``.

A run called ``cut`` continues from the middle of the one called ``straight``. The weights in the end go to
``OUT/RUN.pt``; the first process prints the engine, and how many parameters it has divided.
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

from xvlm import distributed, engine, train
from xvlm.optim import OptimConfig
from xvlm.tasks.pretraining import PretrainingConfig, Task

DEEPSPEED = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
if DEEPSPEED or os.environ.get("ACCELERATE_USE_FSDP") == "true":
    # accelerate takes these engines for GPUs only. They run on CPUs as well, so it is told that it has GPUs.
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    train.Accelerator = lambda **given: Accelerator(**given | {"cpu": False})

out = Path(sys.argv[1])
config = train.TrainConfig(steps=4, save_every=2, log_every=1, ema=None if DEEPSPEED else 0.5)
accelerator = train.make_accelerator(config, out)
rank = distributed.world().rank
divided = []


class Watched(engine.Engine):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        divided.append(sum(isinstance(p, DTensor) for p in self.model.parameters()))


train.Engine = Watched


def batches(start: int):
    while True:
        yield tiny.batch(seed=10 * start + rank, images=2 + rank)  # unequal on purpose
        start += 1


for name in sys.argv[2:]:
    if rank == 0:
        (out / name).mkdir(parents=True)
        if name == "cut":
            shutil.copytree(out / "straight/state/00000002", out / "cut/state/00000002")
    distributed.wait_for_everyone()
    text = tiny.TEXT.model_copy(update={"dropout": 0.1})
    task = Task(PretrainingConfig(), tiny.model(tiny.CONFIG.model_copy(update={"text": text})))
    train.fit(task, {"region": batches}, config, OptimConfig(lr=1e-2, warmup=1), out / name, accelerator)
    if rank == 0:
        torch.save(task.state_dict(), out / f"{name}.pt")
if rank == 0:
    print(json.dumps({"engine": accelerator.distributed_type.value, "divided": divided}))
