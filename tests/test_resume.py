"""Real runs on real shards, killed (SIGKILL) at any moment and started again: samples, losses, weights and optimizer
state continue to the bit; on other numbers of processes and workers, the samples do.
"""

import json
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import tiny
import torch
from tqdm import tqdm

from xvlm import distributed, runlog, states, train
from xvlm.data import scenes
from xvlm.data.processor import Processor, ProcessorConfig
from xvlm.data.stream_config import StreamConfig
from xvlm.data.streams import loader
from xvlm.data.words import WordMasking
from xvlm.data.writing import write_shards
from xvlm.optim import OptimConfig
from xvlm.tasks.pretraining import PretrainingConfig, Task

STEPS, RECORDS = 8, 14  # an epoch of captions ends within a batch
TIMING = {"seconds", "images_per_s", "texts_per_s", "waiting_for_data", "memory_gb", "continued_from"}
PATIENCE = 1000  # seconds, of a machine that may be busy; a test that hangs ends by its own limit
FORK = multiprocessing.get_context("fork")  # nothing to import again


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    samples = scenes.samples(scenes.SceneConfig(size=64), "train", RECORDS)
    write_shards(samples, folder / "train", samples_per_shard=5, progress=False)
    return folder / "train"


@pytest.fixture(scope="module")
def straight(shards, tmp_path_factory) -> dict[str, Path]:
    """A run of each recipe that nobody disturbs, without loader workers and in this process."""
    folders = {recipe: tmp_path_factory.mktemp(recipe) for recipe in ("alternate", "joint")}
    for recipe, out in folders.items():
        run(shards, out, recipe, workers=0)
    return folders


def run(shards: Path, out: Path, recipe: str, workers: int, steps: int = STEPS) -> None:
    """A run of a small model; what each batch held is noted in ``out``, process by process."""
    torch.set_num_threads(1)
    vocabulary = scenes.vocabulary()
    processor = Processor.from_vocabulary(vocabulary, ProcessorConfig(image_size=32, max_tokens=16))
    text = tiny.TEXT.model_copy(update={"vocab_size": len(vocabulary), "dropout": 0.1})
    config = train.TrainConfig(steps=steps, recipe=recipe, save_every=2, log_every=1)
    accelerator = train.make_accelerator(config, out)
    rank, world = distributed.world()

    def opened(grain: str) -> Callable:
        stream = StreamConfig(shards=[shards], grain=grain, images=4, max_regions=3, workers=workers)

        def start(n: int):
            for batch in loader(stream, processor, WordMasking(), seed=1, start=n, rank=rank, world=world):
                with (out / f"ids.{world}.{rank}").open("a") as file:
                    file.write(json.dumps([grain, n, batch.ids]) + "\n")
                yield batch
                n += 1

        return start

    task = Task(PretrainingConfig(), tiny.model(tiny.CONFIG.model_copy(update={"text": text})))
    streams = {grain: opened(grain) for grain in ("caption", "region")}
    train.fit(task, streams, config, OptimConfig(lr=1e-3), out, accelerator)


def start(target: Callable, *arguments) -> multiprocessing.Process:
    def work() -> None:
        tqdm.set_lock(threading.RLock())  # else who is killed while drawing a bar takes the lock of all with it
        target(*arguments)

    arguments[1].mkdir(exist_ok=True)
    process = FORK.Process(target=work)
    process.start()
    return process


def finish(*processes: multiprocessing.Process) -> None:
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0


def kill(process: multiprocessing.Process, ready: Callable[[], bool], after: float = 0.0) -> None:
    """SIGKILL, a tenth of ``after`` seconds from when something is so."""
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(after / 10)
    process.kill()
    process.join()
    assert process.exitcode == -9


def batches(out: Path, world: int = 1) -> dict[tuple[str, int], list[str]]:
    """Ids of each batch by stream and number; a batch that was read twice must have been the same."""
    found: dict[tuple[str, int], list[str]] = {}
    for rank in range(world):
        mine: dict[tuple[str, int], list[str]] = {}
        for line in (out / f"ids.{world}.{rank}").read_text().splitlines():
            grain, n, ids = json.loads(line)
            assert mine.setdefault((grain, n), ids) == ids
        for key, ids in mine.items():
            found.setdefault(key, []).extend(ids)
    return found


def assert_equal(a, b, where: str = "") -> None:
    """To the bit, through dictionaries and lists."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}.{i}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


def assert_same_run(a: Path, b: Path) -> None:
    logs = [[{k: v for k, v in line.items() if k not in TIMING} for line in runlog.read_log(out)] for out in (a, b)]
    assert logs[0] == logs[1] and len(logs[0]) > 0
    assert batches(a) == batches(b)
    saved = [torch.load(states.states(out)[0] / "state.pt") for out in (a, b)]
    assert len(saved[0]["optimizer"]) > 50
    assert_equal(*saved)


def killed_and_continued(shards: Path, out: Path, recipe: str, steps: int, moments: list[float]) -> None:
    """A run with two loader workers, killed at each of some moments: a step, and by its fraction how long after it."""
    for moment in moments:
        process = start(run, shards, out, recipe, 2, steps)
        kill(process, lambda: any(line["step"] >= moment for line in runlog.read_log(out)), after=moment % 1)  # noqa: B023
    finish(start(run, shards, out, recipe, 2, steps))


@pytest.mark.parametrize("recipe", ["alternate", "joint"])
def test_a_killed_run_continues_to_the_bit(shards, straight, tmp_path, recipe):
    moment = Random().uniform(1, STEPS - 2)
    print(f"killed at {moment}")
    killed_and_continued(shards, tmp_path / "killed", recipe, STEPS, [moment])
    assert_same_run(straight[recipe], tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.timeout(3600)  # ten runs
@pytest.mark.parametrize("seed", range(8))
def test_a_run_killed_many_times_continues_to_the_bit(shards, tmp_path, seed):
    recipe, steps, random = ("alternate", "joint")[seed % 2], 40, Random(seed)
    finish(start(run, shards, tmp_path / "straight", recipe, 0, steps))
    moments = sorted(random.uniform(1, steps - 2) for _ in range(8))
    killed_and_continued(shards, tmp_path / "killed", recipe, steps, moments)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_a_run_killed_while_a_state_is_written_continues_to_the_bit(shards, straight, tmp_path):
    def stuck(shards: Path, out: Path, *arguments) -> None:
        whole = torch.save

        def half(state, path: Path) -> None:
            whole(state, path)
            if state["step"] == 4:
                with path.open("r+b") as file:
                    file.truncate(path.stat().st_size // 2)
                (out / "stuck").touch()
                time.sleep(100)

        torch.save = half  # in this process only
        run(shards, out, *arguments)

    out = tmp_path / "killed"
    kill(start(stuck, shards, out, "joint", 1), (out / "stuck").exists)
    assert [state.name for state in states.states(out)] == ["00000002"]
    finish(start(run, shards, out, "joint", 1))
    assert_same_run(straight["joint"], out)


def in_group(shards: Path, out: Path, rank: int, world: int, port: int, *arguments) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of the tests before
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {name: str(value) for name, value in place.items()} | {"ACCELERATE_USE_CPU": "true"}
    run(shards, out, *arguments)
    torch.distributed.destroy_process_group()


def test_a_run_continued_on_two_processes_reads_the_same_samples(shards, straight, tmp_path):
    expected = batches(straight["alternate"])
    out = tmp_path / "killed"
    kill(start(run, shards, out, "alternate", 2), lambda: len(runlog.read_log(out)) >= 3)
    before = torch.load(states.states(out)[0] / "state.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    finish(*[start(in_group, shards, out, rank, 2, port, "alternate", 1) for rank in (0, 1)])
    assert {key: expected[key] for key in batches(out)} == batches(out)
    assert batches(out, world=2) == {
        (grain, n): ids for (grain, n), ids in expected.items() if n >= before["positions"][grain]
    }
    seen = [torch.load(states.states(folder)[0] / "state.pt")["seen"] for folder in (straight["alternate"], out)]
    assert seen[0] == seen[1]
    assert seen[0]["caption/scenes/images"] == 4 * STEPS
