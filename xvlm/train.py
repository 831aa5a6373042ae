"""The training loop: any task that returns named losses, on one process or many, resumable at any update.

A run is a folder: ``config.yaml``, ``log.jsonl`` and ``state/<step>``. Starting the same command again continues it.
All randomness of a step is drawn from (seed, step, rank) and all data from a position per stream, so a resumed run
repeats the uninterrupted one to the bit.
"""

import json
import logging
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from xvlm import distributed, hub
from xvlm.config import ConfigError, Configured, dump_config, parse_yaml
from xvlm.models import economy
from xvlm.optim import OptimConfig, lr_factor, make_optimizer, set_lr
from xvlm.types import Batch

logger = logging.getLogger(__name__)

ASK_EVERY = 3.0  # seconds between two looks at whether a run should stop, where there are several processes

# A stream of batches from the given update on. An update reads as many as take turns (``TrainConfig.accumulate``).
Open = Callable[[int], Iterator[Batch]]


class TrainConfig(Configured):
    steps: Annotated[int, Field(ge=1)] = 1000
    seed: int = 0
    # `alternate`: with probability `region_probability` an update on a region batch, then one on a caption batch
    # (X-VLM's Pretrain.py); `joint`: one update on both.
    recipe: Literal["alternate", "joint"] = "alternate"
    region_probability: float = 0.5
    # Into how many parts each process divides its share of an update's images: the memory of one, the gradient of all.
    accumulate: Annotated[int, Field(ge=1)] = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False  # of the encoders: layers are computed a second time, instead of remembered
    compile: bool = False  # the encoders, by torch.compile: see xvlm/models/economy.py
    log_every: Annotated[int, Field(ge=1)] = 10
    save_every: Annotated[int, Field(ge=1)] = 500
    keep: Annotated[int, Field(ge=1)] = 2  # newest states that are kept
    trackers: list[str] = []  # accelerate's: tensorboard, wandb, ...


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


def make_accelerator(config: TrainConfig, out: Path, *, all_heads: bool = False) -> Accelerator:
    """Processes, device and precision.

    Args:
        all_heads: every update uses every parameter, so that several processes need not look for unused ones.
    """
    return Accelerator(
        cpu=not torch.cuda.is_available(),  # else several processes without a GPU would not find each other
        mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
        log_with=config.trackers or None,
        project_config=ProjectConfiguration(project_dir=str(out)),
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=not all_heads),
            InitProcessGroupKwargs(timeout=timedelta(hours=12)),  # the others wait while the first packs a corpus
        ],
    )


def claim(out: Path, config: Configured) -> None:
    """Make a run folder, or check that it belongs to this very configuration.

    Raises:
        ConfigError: the folder holds a run of another configuration; names the keys that differ.
    """
    file = out / "config.yaml"
    if file.exists():
        before, now = _flat(parse_yaml(file.read_text())), _flat(parse_yaml(dump_config(config)))
        differ = [
            f"{key} was {before.get(key)!r}, is now {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if differ:
            raise ConfigError(f"{out} holds a run of another configuration ({'; '.join(differ)}); choose another out=")
    elif distributed.world().rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        hub.write_atomically(file, dump_config(config))


def fit(
    task: nn.Module,
    streams: Mapping[str, Open],
    config: TrainConfig,
    optim: OptimConfig,
    out: Path,
    accelerator: Accelerator,
    *,
    fresh: Sequence[str] = (),
) -> int:
    """Train ``task`` in place, from the newest state in ``out`` if there is one.

    Args:
        task: called with ``{stream: batch}``, returns losses by name.
        streams: how to open each stream of batches at a given batch number.
        fresh: parameters that learn at the new layers' rate.

    Returns:
        The step the run began at: 0, or where an earlier start of it had stopped.

    Raises:
        Interrupted: after SIGTERM or Ctrl-C; the state is saved.
        FloatingPointError: a loss that is not finite, by name, with the records of the batch.
    """
    optimizer = make_optimizer(task, optim, fresh)
    step, positions = _restore(out, task, optimizer, streams)
    task.train()
    if config.compile:
        economy.compile_layers(task)
    if config.gradient_checkpointing:
        economy.checkpoint_layers(task)
    model, optimizer = accelerator.prepare(task, optimizer)
    opened: dict[str, Iterator[Batch]] = {}
    log = _Log(out, accelerator, step, config)
    stop = _StopRequest()
    begun = step
    with stop, tqdm(total=config.steps, initial=step, unit="step", disable=not accelerator.is_main_process) as bar:
        while step < config.steps:
            lr = optim.lr * lr_factor(step, config.steps, optim)
            set_lr(optimizer, lr)
            for number, update in enumerate(updates(config, step, list(streams))):
                started = time.perf_counter()
                for stream in update:
                    if stream not in opened:
                        opened[stream] = streams[stream](positions[stream])
                    positions[stream] += 1
                parts = [{stream: next(opened[stream]) for stream in update} for _ in range(config.accumulate)]
                waited = time.perf_counter() - started
                seed = partial(seed_step, config.seed, step, number)
                losses = _update(model, parts, optimizer, optim, accelerator, seed)
                log.add(losses, parts, waited)
            step += 1
            rate = log.step(step, lr, bar)
            bar.update()
            bar.set_postfix_str(rate, refresh=False)
            stopping = stop.due(step) and stop.requested()
            if step % config.save_every == 0 or step == config.steps or stopping:
                _save(out, step, positions, accelerator.unwrap_model(model), optimizer, config.keep)
            if stopping and step < config.steps:
                raise Interrupted(f"stopped at step {step} of {config.steps}; the same command continues")
    log.close()
    # Each process has gathered its own running statistics; what is evaluated must be what is saved.
    distributed.copy_from_main(task.buffers())
    return begun


def _update(
    model: nn.Module,
    parts: list[dict[str, Batch]],
    optimizer: torch.optim.Optimizer,
    optim: OptimConfig,
    accelerator: Accelerator,
    seed: Callable[[], None],
) -> dict[str, Tensor]:
    """One update on batches that take turns; their losses are averaged, as those of processes are."""
    turns = distributed.Turns(len(parts))
    sums: dict[str, Tensor] = {}

    def losses_of(part: dict[str, Batch]) -> dict[str, Tensor]:
        seed()
        with accelerator.autocast():
            return model({stream: batch.to(accelerator.device) for stream, batch in part.items()})

    if len(parts) > 1:
        for turn, part in enumerate(parts):
            with turns.listen(turn):
                losses_of(part)
    for turn, part in enumerate(parts):
        last = turn == len(parts) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            with turns.speak(turn):
                losses = losses_of(part)
            total = sum(losses.values())
            if not torch.isfinite(total):
                values = {name: float(loss.detach()) for name, loss in losses.items()}
                ids = {stream: batch.ids[:8] for stream, batch in part.items()}
                raise FloatingPointError(f"losses {values} on the batches with records {ids}")
            accelerator.backward(total / len(parts))
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss.detach() / len(parts)
    norm = accelerator.clip_grad_norm_(model.parameters(), optim.clip)
    optimizer.step()
    optimizer.zero_grad()
    return sums | {"gradient_norm": torch.as_tensor(norm)}


def updates(config: TrainConfig, step: int, streams: list[str]) -> list[list[str]]:
    """Which streams each update of a step reads; the same on every process, whatever else draws random numbers."""
    if config.recipe == "joint" or len(streams) == 1:
        return [streams]
    coin = random.Random(f"{config.seed} recipe {step}").random() < config.region_probability
    return ([["region"]] if coin else []) + [["caption"]]


def seed_step(seed: int, step: int, update: int = 0) -> None:
    """Dropout, stochastic depth and negatives depend on (seed, step, update of the step, rank) and nothing else."""
    said = f"{seed} step {step} update {update} rank {distributed.world().rank}"
    torch.manual_seed(random.Random(said).getrandbits(63))


# States.


def states(out: Path) -> list[Path]:
    """Folders of the saved states of a run, the newest first."""
    return sorted((out / "state").glob("[0-9]*"), reverse=True) if (out / "state").is_dir() else []


def _restore(
    out: Path, task: nn.Module, optimizer: torch.optim.Optimizer, streams: Mapping[str, Open]
) -> tuple[int, dict[str, int]]:
    """Continue from the newest state that can be read.

    Raises:
        ValueError: there are states, but none can be read.
    """
    for state in states(out):
        try:
            saved = torch.load(state / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can fail in any way
            logger.warning("%s cannot be read, going back to the state before it: %s", state / "state.pt", error)
            continue
        task.load_state_dict(saved["task"])
        optimizer.load_state_dict(saved["optimizer"])
        return saved["step"], saved["positions"]
    if states(out):
        raise ValueError(f"{out / 'state'}: none of the states can be read; remove the folder to train from the start")
    return 0, dict.fromkeys(streams, 0)


def _save(out: Path, step: int, positions: dict[str, int], task: nn.Module, optimizer, keep: int) -> None:
    """Write a state beside its final place and move it there in one step; older ones go only afterwards."""
    if distributed.world().rank == 0:
        folder, unfinished = out / "state" / f"{step:08d}", out / "state" / ".unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        saved = {"step": step, "positions": positions, "task": task.state_dict(), "optimizer": optimizer.state_dict()}
        with hub.replacing(unfinished / "state.pt") as file:
            torch.save(saved, file)
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
        for old in sorted((out / "state").glob("[0-9]*"))[:-keep]:
            shutil.rmtree(old)
    distributed.wait_for_everyone()


# Logging.


class _Log:
    """Averages over all processes since the last line, to ``log.jsonl``, to the trackers and to the bar.

    ``skipped`` counts the broken samples of the whole run, those before an interruption included.
    """

    def __init__(self, out: Path, accelerator: Accelerator, step: int, config: TrainConfig):
        self.accelerator, self.config = accelerator, config
        self.path = out / "log.jsonl"
        self.before, self.begun = seconds_so_far(out, step), time.perf_counter()
        self._reset()
        self.skipped = 0  # by this process; the first also carries what was skipped before the run was continued
        if config.trackers:
            accelerator.init_trackers(out.name)
        if accelerator.is_main_process:
            kept = [line for line in read_log(out) if line["step"] <= step]
            hub.write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            self.skipped = kept[-1]["skipped"] if kept else 0

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.images, self.texts, self.waited, self.since = 0, 0, 0.0, time.perf_counter()

    def add(self, losses: dict[str, Tensor], parts: list[dict[str, Batch]], waited: float) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        for batch in (batch for part in parts for batch in part.values()):
            self.images += len(batch.images)
            self.texts += len(batch.texts.ids)
            for skipped in batch.skipped:
                self.skipped += 1
                tqdm.write(f"skipped {skipped}")
        self.waited += waited

    def step(self, step: int, lr: float, bar: tqdm) -> str:
        seconds = time.perf_counter() - self.since
        world = distributed.world().size
        rate = f"{world * self.images / seconds:.0f} images/s {world * self.texts / seconds:.0f} texts/s"
        if step % self.config.log_every == 0 or step == self.config.steps:
            means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
            counts = {"images_per_s": self.images / seconds, "texts_per_s": self.texts / seconds}
            parts = distributed.gather_objects((means, counts | {"skipped": self.skipped}))
            line = {"step": step, "lr": lr}
            line |= {name: sum(part[name] for part, _ in parts) / len(parts) for name in means}
            line |= {name: sum(part[name] for _, part in parts) for name in parts[0][1]}
            line |= {"waiting_for_data": self.waited / seconds}
            line |= {"seconds": self.before + time.perf_counter() - self.begun}
            if self.accelerator.is_main_process:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            self.accelerator.log(line, step=step)
            self._reset()
        return rate

    def close(self) -> None:
        if self.config.trackers:
            self.accelerator.end_training()


def read_log(out: Path) -> list[dict]:
    """The lines of a run's log; a last line that a kill cut short is left out."""
    path, lines = out / "log.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def seconds_so_far(out: Path, step: int | None = None) -> float:
    """Seconds of training that a run's log accounts for, up to a step."""
    return max((line["seconds"] for line in read_log(out) if step is None or line["step"] <= step), default=0.0)


class _StopRequest:
    """SIGTERM and Ctrl-C ask for a clean stop after the step; a second Ctrl-C stops at once."""

    def __init__(self):
        self.signalled = False
        self.every, self.asked = 1, time.perf_counter()

    def __enter__(self) -> None:
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame) -> None:
        self.signalled = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def requested(self) -> bool:
        """Whether any process was asked: all of them leave after the same step."""
        told = distributed.gather_objects((self.signalled, time.perf_counter() - self.asked))
        seconds = max(seconds for _, seconds in told)  # the same on all processes, so that they agree on the next time
        self.every = min(100, max(1, round(self.every * ASK_EVERY / max(seconds, 1e-6))))
        self.asked = time.perf_counter()
        return any(signalled for signalled, _ in told)

    def due(self, step: int) -> bool:
        """Whether to ask: several processes do it every few seconds only, because each time they all wait."""
        return distributed.world().size == 1 or step % self.every == 0


def _flat(values, prefix: str = "") -> dict[str, object]:
    if not isinstance(values, dict):
        return {prefix.removesuffix("."): values}
    return {key: v for name, value in values.items() for key, v in _flat(value, f"{prefix}{name}.").items()}
