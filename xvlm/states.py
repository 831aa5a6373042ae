"""The saved states of a run, ``state/<step>/state.pt``: written whole or not at all, the newest few kept."""

import logging
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from xvlm import distributed, hub
from xvlm.engine import Engine

logger = logging.getLogger(__name__)


def states(out: Path) -> list[Path]:
    """Folders of the saved states of a run, the newest first."""
    return sorted((out / "state").glob("[0-9]*"), reverse=True) if (out / "state").is_dir() else []


def place(out: Path, step: int) -> Path:
    """Where the state after a step is."""
    return out / "state" / f"{step:08d}"


class Progress(NamedTuple):
    """How far a run has come: steps, the updates read from each stream, and what was seen in them."""

    step: int
    positions: dict[str, int]
    seen: dict[str, int]


def restore(out: Path, engine: Engine) -> Progress | None:
    """Continue from the newest state that every process can read; None where there is no state yet.

    Raises:
        ValueError: there are states, but none can be read.
    """
    for state in states(out):
        try:
            saved, error = torch.load(state / "state.pt", map_location="cpu", weights_only=True), None
        except Exception as raised:  # a damaged file can fail in any way
            saved, error = None, raised
        if errors := [text for text in distributed.gather_objects(error and str(error)) if text is not None]:
            logger.warning("%s cannot be read, going back to the state before it: %s", state / "state.pt", errors[0])
            continue
        engine.load(saved)
        engine.load_own(state)
        return Progress(saved["step"], saved["positions"], saved["seen"])
    if states(out):
        raise ValueError(f"{out / 'state'}: none of the states can be read; remove the folder to train from the start")
    return None


def save(out: Path, progress: Progress, engine: Engine, keep: int) -> None:
    """Write a state beside its final place and move it there in one step; older ones go only afterwards."""
    saved = progress._asdict() | engine.state()
    folder, unfinished = place(out, progress.step), out / "state" / ".unfinished"
    if distributed.world().rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    distributed.wait_for_everyone()
    engine.save_own(unfinished)
    distributed.wait_for_everyone()
    if distributed.world().rank == 0:
        with hub.replacing(unfinished / "state.pt") as file:
            torch.save(saved, file)
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
        for old in states(out)[keep:]:
            shutil.rmtree(old)
    distributed.wait_for_everyone()
