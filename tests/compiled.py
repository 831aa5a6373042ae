"""Losses of compiled encoders against plain ones over batches of ever other sizes, and how often they were compiled."""

import json
import sys

import tiny
import torch
from torch._dynamo.utils import counters

from xvlm.models.economy import checkpoint_layers, compile_layers
from xvlm.models.vision import VisionConfig
from xvlm.tasks.pretraining import PretrainingConfig, Task

config = tiny.CONFIG.model_copy(update={"vision": VisionConfig.model_validate_json(sys.argv[1])})
plain, compiled = (Task(PretrainingConfig(), tiny.model(config)) for _ in range(2))
compile_layers(compiled, backend="inductor" if "inductor" in sys.argv else "aot_eager")
if "checkpoint" in sys.argv:
    checkpoint_layers(compiled)
graphs, differences = [], []
for number in range(8):
    batch = tiny.batch(images=3, per_image=3 + number, seed=number)
    found = []
    for task in (plain, compiled):
        torch.manual_seed(number)
        task.zero_grad()
        named = task({"region": batch})
        sum(named.values()).backward()
        found.append([*(loss.detach() for loss in named.values()), *(p.grad.norm() for p in task.parameters())])
    differences += [float((a - b).abs() / (1 + a.abs())) for a, b in zip(*found, strict=True)]
    graphs.append(counters["stats"]["unique_graphs"])
print(json.dumps({"graphs": graphs, "difference": max(differences), "breaks": dict(counters["graph_break"])}))
