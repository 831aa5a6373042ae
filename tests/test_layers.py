"""Imports point down: parts know the rows above them in ``LAYERS``, and heavy packages stay where they belong."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "xvlm"

LAYERS = (
    {"config", "types", "boxes", "distributed", "hub", "prose"},
    {"losses", "metrics", "optim", "models", "data"},
    {"tasks", "zeroshot"},
    {"train", "engine", "states", "runlog", "evaluate", "grounder", "presence", "embed"}
    | {"viz", "report", "bench", "probe", "run"},
)
FREE = {"__init__", "__main__", "commands"}  # choose and wire
ONLY_IN = {"accelerate": {"train", "engine", "runlog"}, "torch.distributed": {"distributed"}}
NEVER = {"pretrain", "finetune", "tests"}


def part_of(module: str) -> str:
    """xvlm.models.text -> models; xvlm -> __init__."""
    return [*module.split("."), "__init__"][1]


def may_import(module: str, other: str) -> bool:
    """Whether one module of the package may import another, both as dotted names."""
    mine, theirs = part_of(module), part_of(other)
    if theirs in ("__main__", "commands"):
        return mine == "commands" == theirs or (mine, theirs) == ("__main__", "commands")
    if mine in FREE:
        return mine != "__main__" or theirs not in ("tasks", "zeroshot", *LAYERS[-1])  # what commands choose from
    if mine == theirs:  # a task is alone; the modules of any other folder may know each other
        return mine != "tasks" or module in ("xvlm.tasks", other)
    row, their_row = (next((i for i, layer in enumerate(LAYERS) if part in layer), None) for part in (mine, theirs))
    if row is None or their_row is None:
        return False
    if row == len(LAYERS) - 1:
        return theirs not in ("tasks", "zeroshot")
    return their_row < row or (mine, theirs) == ("zeroshot", "tasks")


def imported(module: str, tree: ast.AST, *, is_package: bool) -> list[tuple[int, str]]:
    """Line and dotted name of everything imported; ``from a import b`` is both a and a.b."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: None if is_package else -1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            names += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
            names.append((node.lineno, base))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names.append((node.lineno, f"{node.value.id}.{node.attr}"))  # torch.distributed, without an import of it
    return names


def broken_rules(module: str, source: str, modules: set[str], *, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module, in words.

    Args:
        module: dotted name; ``modules``: the dotted names of all there are.
    """
    mine = part_of(module)
    if mine not in FREE and not any(mine in layer for layer in LAYERS):
        return [f"{module}: {mine!r} is in no row of LAYERS; decide what it may know"]
    wrong = []
    for line, name in sorted(set(imported(module, ast.parse(source), is_package=is_package))):
        package = name.split(".")[0]
        if package in NEVER:
            wrong.append(f"{module} line {line}: imports {name}; the library does not know its users")
        for heavy, homes in ONLY_IN.items():
            if (name == heavy or name.startswith(f"{heavy}.")) and mine not in homes:
                wrong.append(f"{module} line {line}: imports {name}; only {', '.join(sorted(homes))} may")
        if package == "xvlm" and name not in ("xvlm", "xvlm.__version__"):
            if part_of(name) not in {part_of(m) for m in modules} | FREE and mine not in FREE:
                wrong.append(f"{module} line {line}: imports {name} from the package's front; import its module")
            elif name in modules and not may_import(module, name):
                wrong.append(f"{module} line {line}: imports {name}, which is not above it")
    return wrong


def package_modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ["xvlm", *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = package_modules()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module):
    path = MODULES[module]
    wrong = broken_rules(module, path.read_text(encoding="utf-8"), set(MODULES), is_package=path.name == "__init__.py")
    assert not wrong, "\n".join(wrong)


THERE = {
    *("xvlm", "xvlm.boxes", "xvlm.types", "xvlm.losses", "xvlm.metrics", "xvlm.models", "xvlm.models.text"),
    *("xvlm.data", "xvlm.data.records", "xvlm.tasks", "xvlm.tasks.vqa", "xvlm.tasks.grounding", "xvlm.zeroshot"),
    *("xvlm.zeroshot.crops", "xvlm.train", "xvlm.evaluate", "xvlm.distributed", "xvlm.bench"),
    *("xvlm.commands", "xvlm.commands.data", "xvlm.commands.bench", "xvlm.__main__"),
}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("xvlm.boxes", "from xvlm import types"),
        ("xvlm.boxes", "def late():\n    import xvlm.types"),
        ("xvlm.boxes", "from .types import Batch"),
        ("xvlm.losses", "from xvlm.metrics import mean_iou"),
        ("xvlm.data.records", "from ..models import text"),
        ("xvlm.data.records", "from xvlm import XVLM"),
        ("xvlm.tasks.vqa", "from xvlm.tasks.grounding import Config"),
        ("xvlm.tasks.vqa", "from . import grounding"),
        ("xvlm.tasks.vqa", "import xvlm.zeroshot.crops as crops"),
        ("xvlm.tasks.vqa", "from xvlm.train import fit"),
        ("xvlm.train", "from xvlm.tasks import vqa"),
        ("xvlm.train", "import xvlm.zeroshot"),
        ("xvlm.tasks.vqa", "from accelerate import Accelerator"),
        ("xvlm.__main__", "import accelerate.utils"),
        ("xvlm.__main__", "from xvlm.tasks import vqa"),
        ("xvlm.commands.data", "import accelerate.utils"),
        ("xvlm.commands.data", "import torch.distributed"),
        ("xvlm.losses", "import torch.distributed as dist"),
        ("xvlm.losses", "from torch import distributed"),
        ("xvlm.losses", "from torch.distributed.nn.functional import all_gather"),
        ("xvlm.losses", "import torch\ntorch.distributed.barrier()"),
        ("xvlm.__main__", "from finetune.train import main"),
        ("xvlm.commands.data", "from finetune.train import main"),
        ("xvlm.commands.data", "from xvlm.__main__ import app"),
        ("xvlm.bench", "from xvlm.commands import bench"),
        ("xvlm", "from xvlm.commands import bench"),
        ("xvlm.train", "import tests.fixtures"),
        ("xvlm.utils", "import os"),
    ],
)
def test_the_check_finds_a_broken_rule(module, source):
    wrong = broken_rules(module, source, THERE | {module})
    assert wrong
    assert all(message.startswith(module) for message in wrong)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("xvlm.losses", "import torch\nfrom torch import nn\nfrom xvlm import boxes, distributed"),
        ("xvlm.models.text", "from xvlm.types import Words\nfrom . import text"),
        ("xvlm.data.records", "from xvlm import __version__"),
        ("xvlm.tasks.vqa", "from xvlm.data.records import Record\nfrom ..models.text import TextEncoder"),
        ("xvlm.zeroshot.crops", "from xvlm.tasks.grounding import Metrics"),
        ("xvlm.train", "import accelerate\nfrom xvlm.evaluate import evaluate"),
        ("xvlm.distributed", "import torch.distributed as dist"),
        ("xvlm.__main__", "from xvlm.commands import data\nfrom xvlm.config import ConfigError"),
        ("xvlm.commands.data", "from xvlm.tasks import vqa\nfrom xvlm import XVLM"),
        ("xvlm.commands.data", "from xvlm.commands import DEFAULT\nfrom xvlm.zeroshot import crops"),
        ("xvlm", "from xvlm.zeroshot.crops import Crops"),
    ],
)
def test_the_check_lets_good_imports_pass(module, source):
    assert broken_rules(module, source, THERE) == []


def test_layers_are_disjoint_and_the_package_was_found():
    names = [name for layer in LAYERS for name in layer]
    assert len(names) == len(set(names))
    assert {"xvlm", "xvlm.boxes", "xvlm.data.records"} <= set(MODULES)
