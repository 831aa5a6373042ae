"""Commands that run scripts and configurations of a checkout: demo, report."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def demo(
    ablation: Annotated[bool, typer.Option(help="Compare all losses, no box loss, no regions; three seeds.")] = False,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value over configs/pretrain/demo.yaml")] = None,
) -> None:
    """Pre-train a small model on generated scenes and show what it learned (from a checkout of the repository)."""
    script = _in_checkout("pretrain/ablation.py" if ablation else "pretrain/train.py")
    config = _in_checkout(f"configs/pretrain/{'ablation' if ablation else 'demo'}.yaml")
    # Quiet: the script says itself what went wrong, a traceback of the launcher would follow it.
    launch = "accelerate.commands.launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no"
    launcher = [] if ablation else ["-m", *launch.split(), "--dynamo_backend", "no"]
    command = [sys.executable, *launcher, str(script), str(config), *(overrides or [])]
    raise SystemExit(subprocess.run(command, check=False).returncode)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of fine-tuning runs; of several, the numbers compared.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the page. Default: the run's own; of several, comparison beside the first."),
    ] = None,
) -> None:
    """Write a page about a run: numbers, slices, curves, best and worst answers drawn (from a checkout)."""
    words = [*map(str, runs), *([] if out is None else [f"out={out}"])]
    command = [sys.executable, str(_in_checkout("finetune/pages.py")), *words]
    raise SystemExit(subprocess.run(command, check=False).returncode)


def _in_checkout(name: str) -> Path:
    """A script or configuration, which the package does not hold."""
    file = Path(__file__).parents[2] / name
    if not file.exists():
        raise FileNotFoundError(f"{file}: this runs from a checkout of the repository (pip install -e .)")
    return file
