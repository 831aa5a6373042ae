"""Losses of economical encoders against plain ones over batches of ever other sizes, and how often they were compiled.

``compiled.py VISION [inductor] [checkpoint] [bf16]``: the first is a trunk's configuration, as JSON.
"""

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
torch.Tensor.exponential_ = lambda dice, *_, **__: dice.fill_(1)  # the same negatives, however the digits fall
graphs, losses, gradients = [], [], []
for number in range(8):
    batch = tiny.batch(images=3, per_image=3 + number, seed=number)
    found = []
    for task in (plain, compiled):
        torch.manual_seed(number)
        task.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in sys.argv and task is compiled):
            named = task({"region": batch})
        sum(named.values()).backward()
        norms = torch.stack([p.grad.norm() for p in task.parameters()])
        found.append((torch.stack([loss.detach() for loss in named.values()]), norms))
    for differences, (a, b) in zip((losses, gradients), zip(*found, strict=True), strict=True):
        differences.append(float(((a - b).abs() / (1 + a.abs())).max()))
    graphs.append(counters["stats"]["unique_graphs"])
breaks = dict(counters["graph_break"])
print(json.dumps({"graphs": graphs, "losses": max(losses), "gradients": max(gradients), "breaks": breaks}))
