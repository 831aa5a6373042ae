"""What a model still knows: numbers of a task from before, with the weights before and after they learn another one.

The old task's heads, which fine-tuning leaves out, are those of the pre-trained weights, put around the encoders that
have learned; a head that both tasks have is the one that has learned.
"""

from typing import Any

import torch
from runs import FinetuneRun, ask, build, fingerprint, shards_of
from torch import nn

from xvlm import report
from xvlm.config import ConfigError
from xvlm.evaluate import Numbers
from xvlm.models import convert, lora
from xvlm.models.decoder import Captioner
from xvlm.models.xvlm import load_strictly

SPLIT = "retention"


def measure(config: FinetuneRun, device: torch.device, learned: nn.Module | None = None) -> Numbers:
    """The old task's numbers with the pre-trained weights, or with what a model has learned in their place.

    Raises:
        ConfigError: the pre-trained weights lack a head of the old task, or its examples are not there.
    """
    old = _old(config)
    shards_of(old, SPLIT)
    task, fresh, processor = build(old)
    if fresh:
        raise ConfigError(f"retention: {config.init.model} knows no {old.task.name}: it lacks {', '.join(fresh)}")
    if learned is not None:
        state = lora.merged(learned).state_dict()
        state = convert.from_captions(state) if isinstance(learned, Captioner) else state
        own = task.model.state_dict()
        load_strictly(task.model, own | {name: tensor for name, tensor in state.items() if name in own}, "retention")
    return old.recipe.numbers(old.task, ask(old, SPLIT, task.to(device), processor))


def about(config: FinetuneRun, before: Numbers, after: Numbers) -> dict[str, Any]:
    """Both with what they depend on."""
    return {
        "task": config.retention.task.name,
        "protocol": _old(config).recipe.explain(before),
        "settings": config.retention.task.model_dump(mode="json"),
        "data": fingerprint(config.retention.shards),
        "before": before,
        "after": after,
    }


def table(result: dict[str, Any]) -> report.Table:
    before, after = result["before"], result["after"]
    rows = [[name, before[name], after[name]] for name in before if name in after]
    return report.Table(f"retained: {result['task']}", ["", "before", "after"], rows, result["protocol"])


def _old(config: FinetuneRun) -> FinetuneRun:
    """The run as one of the old task."""
    asked = {"splits": {SPLIT: config.retention.shards}, "records": config.retention.records}
    changes = {"task": config.retention.task, "lora": None, "from_scratch": False}
    return config.model_copy(update=changes | {"evaluation": config.evaluation.model_copy(update=asked)})
