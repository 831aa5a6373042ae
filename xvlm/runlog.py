"""What a run tells: ``log.jsonl``, ``validation.jsonl``, accelerate's trackers and the progress bar."""

import json
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from xvlm import distributed, hub
from xvlm.config import ConfigError
from xvlm.types import Movable


class Log:
    """Averages over all processes since the last line, to ``log.jsonl``, to the trackers and to the bar.

    ``seen`` counts images and texts by stream, source and kind, and ``skipped`` the broken samples, over the whole run,
    those before an interruption included.
    """

    def __init__(
        self, out: Path, accelerator: Accelerator, step: int, seen: Mapping[str, int], *, every: int, last: int
    ):
        self.accelerator, self.every, self.last = accelerator, every, last
        self.path = out / "log.jsonl"
        self.before, self.begun = seconds_so_far(out, step), time.perf_counter()
        self.continued = {"continued_from": step} if step else {}  # for the next line
        self._reset()
        # By this process; the first also carries what was seen before the run was continued.
        self.seen = Counter(seen if accelerator.is_main_process else {})
        if accelerator.log_with:
            accelerator.init_trackers(out.name)
        if accelerator.is_main_process:
            _cut(self.path, step)

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.images, self.texts, self.waited, self.since = 0, 0, 0.0, time.perf_counter()

    def add(self, losses: dict[str, Tensor], parts: list[dict[str, Movable]], waited: float) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        for stream, batch in (each for part in parts for each in part.items()):
            self.images += len(batch.images)
            self.texts += len(batch.texts.ids)
            self.seen.update({f"{stream}/{what}": n for what, n in batch.seen.items()})
            self.seen.update({"skipped": len(batch.skipped)})
            for skipped in batch.skipped:
                tqdm.write(f"skipped {skipped}")
        self.waited += waited

    def step(self, step: int, lr: float, bar: tqdm) -> None:
        """After every step; a line is written after some."""
        seconds = time.perf_counter() - self.since
        world = distributed.world().size
        rate = f"{world * self.images / seconds:.0f} images/s {world * self.texts / seconds:.0f} texts/s"
        bar.update()  # shows the time left as well
        bar.set_postfix_str(rate, refresh=False)
        if step % self.every == 0 or step == self.last:
            means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
            counts = {"images_per_s": self.images / seconds, "texts_per_s": self.texts / seconds}
            parts = distributed.gather_objects((means, counts, _peak_memory(self.accelerator.device)))
            seen = self.seen_by_all()
            line = {"step": step, "lr": lr}
            line |= {name: sum(part[name] for part, _, _ in parts) / len(parts) for name in means}
            line |= {name: sum(part[name] for _, part, _ in parts) for name in counts}
            line |= {"memory_gb": max(memory for _, _, memory in parts) / 1e9}  # of the process that had most
            if self.accelerator.scaler is not None:
                line |= {"loss_scale": self.accelerator.scaler.get_scale()}
            line |= {"skipped": seen.pop("skipped", 0), "waiting_for_data": self.waited / seconds}
            line |= {"seconds": self.before + time.perf_counter() - self.begun}
            if self.accelerator.is_main_process:
                _append(self.path, line | self.continued | {"seen": seen})
            self.continued = {}
            self.accelerator.log(line | {f"seen/{what}": n for what, n in seen.items()}, step=step)
            self._reset()

    def seen_by_all(self) -> dict[str, int]:
        """What all processes have seen together; every one of them must ask."""
        return dict(sum(distributed.gather_objects(self.seen), Counter()))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is no part of the rates."""
        begun = time.perf_counter()
        yield
        self.since += time.perf_counter() - begun

    def close(self) -> None:
        if self.accelerator.log_with:
            self.accelerator.end_training()


class Validation(NamedTuple):
    """How a task is measured while it trains. Every process calls both."""

    measure: Callable[[], dict[str, float]]  # numbers by name
    keep: Callable[[Path], None]  # write the weights as they are to a folder


class Best:
    """Measures now and then, to ``validation.jsonl`` and the trackers, and keeps the best weights in ``best/``.

    Args:
        number: whose highest value is best; None keeps nothing.
    """

    def __init__(self, out: Path, accelerator: Accelerator, step: int, number: str | None):
        self.out, self.accelerator, self.number = out, accelerator, number
        self.path = out / "validation.jsonl"
        lines = _cut(self.path, step) if accelerator.is_main_process else []
        values = [line[number] for line in lines if number is not None]
        self.value = distributed.gather_objects(max(values, default=-math.inf))[0]

    def validate(self, step: int, validation: Validation) -> None:
        """
        Raises:
            ConfigError: there is no such number as the one that decides; names those there are.
        """
        numbers = distributed.gather_objects(validation.measure())[0]
        if self.number is not None and self.number not in numbers:
            raise ConfigError(f"train.best: {self.number!r} is not measured; there are {', '.join(sorted(numbers))}")
        if self.accelerator.is_main_process:
            _append(self.path, {"step": step} | numbers)
        if self.number is not None and numbers[self.number] > self.value:
            self.value = numbers[self.number]
            validation.keep(self.out / "best")
        self.accelerator.log({f"validation/{name}": value for name, value in numbers.items()}, step=step)


def read_log(out: Path, name: str = "log.jsonl") -> list[dict[str, Any]]:
    """The lines of a run's log; a last line that a kill cut short is left out."""
    path, lines = out / name, []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def seconds_so_far(out: Path, step: int | None = None) -> float:
    """Seconds of training that a run's log accounts for, up to a step."""
    return max((line["seconds"] for line in read_log(out) if step is None or line["step"] <= step), default=0.0)


def _cut(path: Path, step: int) -> list[dict[str, Any]]:
    """Leave only the lines up to a step in a file, because what came after it is done again; returns them."""
    kept = [line for line in read_log(path.parent, path.name) if line["step"] <= step]
    hub.write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _peak_memory(device: torch.device) -> int:
    """Most bytes this process has had so far: of the GPU, or where it runs on the CPU, of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
