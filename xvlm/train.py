"""The training loop: any task that returns named losses, on one process or many, resumable at any update.

A run is a folder: ``config.yaml``, ``log.jsonl`` and ``state/<step>``, and where they are asked for
``validation.jsonl``, ``best`` and ``trace``. Starting the same command again continues it.
All randomness of a step is drawn from (seed, step, rank) and all data from a position per stream, so a resumed run
repeats the uninterrupted one to the bit.
"""

import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
    ProjectConfiguration,
)
from pydantic import Field, model_validator
from torch import Tensor, nn
from tqdm import tqdm

from xvlm import distributed, hub, states
from xvlm.config import ConfigError, Configured, dump_config, parse_yaml
from xvlm.engine import Engine
from xvlm.optim import OptimConfig, lr_factor, set_lr
from xvlm.runlog import Best, Log, Validation
from xvlm.states import Progress
from xvlm.types import Movable

STARTED = ("log.jsonl", "state", "untrained.json", "model")
ASK_EVERY = 3.0  # seconds between two looks at whether a run should stop, where there are several processes
# Fields, by the end of their names, that a run may be continued with other values of: they change nothing it learns.
FREE = (".workers", ".cache.folder", ".cache.gigabytes", ".save_every", ".keep", ".log_every", ".trackers")

# A stream of batches from the given update on. An update reads as many as take turns (``TrainConfig.accumulate``).
Open = Callable[[int], Iterator[Movable]]


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
    # Share of the old average that stays at each step, of the weights that are evaluated and saved; null: no average.
    ema: Annotated[float, Field(ge=0, lt=1)] | None = None
    log_every: Annotated[int, Field(ge=1)] = 10
    save_every: Annotated[int, Field(ge=1)] = 500
    keep: Annotated[int, Field(ge=1)] = 2  # newest states that are kept
    validate_every: Annotated[int, Field(ge=1)] | None = None  # steps; the last one is always validated
    best: str | None = None  # number of the validation whose highest value is kept as `best`: slice/measure
    trackers: list[str] = []  # accelerate's: tensorboard, wandb, ...
    profile: tuple[int, int] | None = None  # steps, from the first to before the second, traced into `trace`

    @model_validator(mode="after")
    def fields_fit_together(self) -> "TrainConfig":
        if self.best is not None and self.validate_every is None:
            raise ValueError("best needs validate_every: nothing is measured")
        if self.profile is not None and not 0 <= self.profile[0] < self.profile[1] <= self.steps:
            raise ValueError(f"profile {self.profile}: expected steps in order, from 0 to {self.steps}")
        return self


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


def make_accelerator(config: TrainConfig, out: Path, *, all_heads: bool = False) -> Accelerator:
    """Processes, device and precision.

    Args:
        all_heads: every update uses every parameter, so that several processes need not look for unused ones.

    Raises:
        ConfigError: a tracker that is not installed.
    """
    available = [tracker.value for tracker in get_available_trackers()]
    if missing := [tracker for tracker in config.trackers if tracker not in available]:
        hint = "pip install -e '.[track]'" if "tensorboard" in missing else "its package is to be installed"
        raise ConfigError(f"train.trackers: {missing[0]} is not installed ({hint}); there are {available}")
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


def started(out: Path) -> bool:
    """Whether the run in a folder has measured or learned anything."""
    return any((out / name).exists() for name in STARTED)


def claim(out: Path, config: Configured) -> None:
    """Make a run folder, or check that it belongs to this very configuration, apart from what is ``FREE``.

    A folder whose run stopped before it measured or learned anything, over a mistyped name say, is taken over.

    Raises:
        ConfigError: the folder holds a run of another configuration; names the keys that differ.
    """
    file = out / "config.yaml"
    if file.exists() and started(out):
        before, now = _flat(parse_yaml(file.read_text())), _flat(parse_yaml(dump_config(config)))
        differ = [
            f"{key} was {before.get(key)!r}, is now {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not key.endswith(FREE)
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
    validation: Validation | None = None,
) -> int:
    """Train ``task``, from the newest state in ``out`` if there is one; in the end it has the weights to be used.

    Args:
        task: called with ``{stream: batch}``, returns losses by name.
        streams: how to open each stream of batches at a given batch number.
        fresh: parameters that learn at the new layers' rate.
        validation: how to measure the task, for ``validate_every``.

    Returns:
        The step the run began at: 0, or where an earlier start of it had stopped.

    Raises:
        Interrupted: after SIGTERM or Ctrl-C; the state is saved.
        FloatingPointError: a loss that is not finite, by name, with the records of the batch, or such a gradient. The
            processes that saw it raise it; the others leave (``SystemExit``).
        ConfigError: ``best`` is not among the numbers of the validation; see also :class:`Engine`.
    """
    economies = {"checkpoint": config.gradient_checkpointing, "compile": config.compile}
    engine = Engine(task, optim, accelerator, fresh=fresh, ema=config.ema, **economies)
    engine.model.train()  # after it is known what does not learn: statistics of frozen layers stay
    if engine.deepspeed and config.accumulate > 1:
        raise ConfigError("train.accumulate: DeepSpeed updates the weights after every backward pass")
    begun, positions, seen = states.restore(out, engine) or Progress(0, dict.fromkeys(streams, 0), {})
    step = begun
    if begun and accelerator.is_main_process:
        checkpoint = states.place(out, begun)
        print(f"continuing from step {begun} of {config.steps} (checkpoint {checkpoint})", flush=True)
    opened: dict[str, Iterator[Movable]] = {}
    log = Log(out, accelerator, step, seen, every=config.log_every, last=config.steps)
    best = None if validation is None or config.validate_every is None else Best(out, accelerator, step, config.best)
    stop = _StopRequest()
    bar = tqdm(total=config.steps, initial=step, unit="step", disable=not accelerator.is_main_process)
    with stop, bar, _profiler(config.profile, begun, out, accelerator) as profiler:
        while step < config.steps:
            lr = optim.lr * lr_factor(step, config.steps, optim)
            set_lr(engine.optimizer, lr)
            for number, update in enumerate(updates(config, step, list(streams))):
                started = time.perf_counter()
                for stream in update:
                    if stream not in opened:
                        opened[stream] = streams[stream](positions[stream])
                    positions[stream] += 1
                parts = [{stream: next(opened[stream]) for stream in update} for _ in range(config.accumulate)]
                waited = time.perf_counter() - started
                seed = partial(seed_step, config.seed, step, number)
                losses = _update(engine.model, parts, engine.optimizer, optim, accelerator, seed)
                log.add(losses, parts, waited)
            step += 1
            if engine.average is not None:
                engine.average.update(step)
            log.step(step, lr, bar)
            if best is not None and (step % config.validate_every == 0 or step == config.steps):
                with log.paused(), engine.published():
                    best.validate(step, validation)
            stopping = stop.due(step) and stop.requested()
            if step % config.save_every == 0 or step == config.steps or stopping:
                states.save(out, Progress(step, positions, log.seen_by_all()), engine, config.keep)
            if profiler is not None:
                profiler.step()
            if stopping and step < config.steps:
                raise Interrupted(f"stopped at step {step} of {config.steps}; the same command continues")
    log.close()
    engine.publish()
    return begun


def _update(
    model: nn.Module,
    parts: list[dict[str, Movable]],
    optimizer: torch.optim.Optimizer,
    optim: OptimConfig,
    accelerator: Accelerator,
    seed: Callable[[], None],
) -> dict[str, Tensor]:
    """One update on batches that take turns; their losses are averaged, as those of processes are."""
    turns = distributed.Turns(len(parts))
    sums: dict[str, Tensor] = {}

    def losses_of(part: dict[str, Movable]) -> dict[str, Tensor]:
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
            # All processes ask, else the others would wait for the one that left.
            if distributed.anywhere(~(finite := torch.isfinite(total))):
                if finite:
                    raise SystemExit(1)
                values = {name: float(loss.detach()) for name, loss in losses.items()}
                raise FloatingPointError(f"losses {values} on {_whose(part)}")
            accelerator.backward(total / len(parts))
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss.detach() / len(parts)
    norm = torch.as_tensor(accelerator.clip_grad_norm_(model.parameters(), optim.clip))
    if accelerator.mixed_precision != "fp16" and not torch.isfinite(norm):  # its scaler leaves such an update out
        whose = "; ".join(_whose(part) for part in parts)
        raise FloatingPointError(f"the gradient's norm is {float(norm)} after {whose}")
    optimizer.step()
    optimizer.zero_grad()
    return sums | {"gradient_norm": norm}


def _whose(part: dict[str, Movable]) -> str:
    ids = {stream: batch.ids[:8] for stream, batch in part.items()}
    return f"process {distributed.world().rank}'s batches with records {ids}"


def _profiler(
    window: tuple[int, int] | None, begun: int, out: Path, accelerator: Accelerator
) -> AbstractContextManager[torch.profiler.profile | None]:
    """torch's profiler for a window of steps; a Chrome trace of each process goes to ``trace`` in the run folder."""
    if window is None or window[1] <= begun:
        return nullcontext()
    first = max(window[0], begun)
    folder = out / "trace"
    folder.mkdir(exist_ok=True)

    def write(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(folder / f"steps-{first}-{window[1]}-process-{accelerator.process_index}.json"))

    warm = min(1, first - begun)  # a step that is traced and thrown away, where there is one
    schedule = {"skip_first": first - begun - warm, "wait": 0, "warmup": warm, "active": window[1] - first, "repeat": 1}
    return accelerator.profile(ProfileKwargs(schedule_option=schedule, on_trace_ready=write))


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
