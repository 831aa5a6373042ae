"""Fine-tune on any task: ``accelerate launch finetune/train.py CONFIG [key=value …] [--show | --dry-run]``.

The configuration names the task (``task.name``). Packs the corpus if it is not packed, trains (or continues), answers
every split of ``evaluation`` and leaves weights, predictions, results and ``report.html`` in the run folder. The same
command continues a run that was interrupted.
"""

import json
import time
from pathlib import Path

import retention
import torch
from pages import page
from runs import (
    FinetuneRun,
    ask,
    build,
    calibrate,
    check_calibration,
    facts,
    fingerprint,
    judge,
    tables,
    trained_on,
    write_rows,
)

from xvlm import distributed, hub, probe, runlog, train
from xvlm.data import scenes
from xvlm.data.pack import CorpusConfig
from xvlm.data.processor import Processor
from xvlm.data.shards import Shards
from xvlm.evaluate import Numbers
from xvlm.models import lora
from xvlm.optim import freeze, learning
from xvlm.run import command, dry_folder, finished, keep, prepare, script

SHIPPED = "xvlm-scenes-tiny"


def main(arguments: list[str]) -> None:
    command(FinetuneRun, run, arguments)


def run(config: FinetuneRun, dry_run: bool) -> None:
    accelerator = train.make_accelerator(config.train, config.out)
    config = dry(config) if dry_run else config
    if finished(config):
        return
    started = time.time() - runlog.seconds_so_far(config.out)
    prepare(config, [config.stream], config.evaluation.splits.values())
    check_calibration(config)
    if distributed.world().rank == 0:
        folders = {"train": trained_on(config)} | {split: [at] for split, at in config.evaluation.splits.items()}
        counts = {split: sum(len(Shards(each)) for each in folders[split]) for split in folders}
        print(f"images: {', '.join(f'{split} {count:,}' for split, count in counts.items())}")
    torch.manual_seed(config.train.seed)
    task, fresh, processor = build(config)
    task.to(accelerator.device)
    config.recipe.prepare(task, processor, trained_on(config))
    before = untrained(config, task, processor)
    knew = None if config.retention is None else retention.measure(config, accelerator.device)
    freeze(task, config.optim.freeze)
    learn, parameters = learning(task)
    world = distributed.world()
    if world.rank == 0:
        print(f"{learn:,} of {parameters:,} parameters learn")

    def open_stream(start: int):
        place = {"seed": config.train.seed, "rank": world.rank, "world": world.size, "turns": config.train.accumulate}
        return config.recipe.stream(config.task, config.stream, processor, **place).batches(start)

    def measure() -> Numbers:
        numbers = measured(config, task, processor)
        return {f"{split}/{name}": value for split, row in numbers.items() for name, value in row.items()}

    def keep_merged(folder: Path) -> None:
        keep(lora.merged(task.model), processor, folder)

    validation = runlog.Validation(measure, keep_merged)
    streams = {"train": open_stream}
    train.fit(task, streams, config.train, config.optim, config.out, accelerator, fresh=fresh, validation=validation)
    keep_merged(config.out / "model")
    if world.rank == 0:
        calibrate(config, task, processor, config.out / "model")
    distributed.gather_objects(None)  # the others read what the first stored
    answered = {split: ask(config, split, task, processor, config.out / "model") for split in config.evaluation.splits}
    knows = None if config.retention is None else retention.measure(config, accelerator.device, task.model)
    if world.rank == 0:
        about = probe.facts(config.out, config.train.seed, (time.time() - started) / 60, accelerator.device)
        about |= {"weights": fingerprint(config.out / "model"), **facts(config, task, config.out / "model")}
        about |= {"parameters": parameters, "parameters that learn": learn}
        if config.retention is not None:
            about |= {"retention": retention.about(config, knew, knows)}
        write(config, before, answered, about)


def untrained(config: FinetuneRun, task: torch.nn.Module, processor: Processor) -> dict[str, Numbers]:
    """The numbers of the model as it starts, for each split; kept in the run folder, for a run that is continued."""
    file = config.out / "untrained.json"
    known = distributed.gather_objects(json.loads(file.read_text()) if file.exists() else None)[0]
    if known is not None or not config.evaluation.untrained:
        return known or {}
    found = measured(config, task, processor)
    if distributed.world().rank == 0:
        hub.write_atomically(file, json.dumps(found, indent=2))
    return found


def measured(config: FinetuneRun, task: torch.nn.Module, processor: Processor) -> dict[str, Numbers]:
    """The numbers of every split."""
    splits = config.evaluation.splits
    return {split: config.recipe.numbers(config.task, ask(config, split, task, processor)) for split in splits}


def write(config: FinetuneRun, before: dict[str, Numbers], answered: dict[str, list], about: dict) -> None:
    """``predictions-SPLIT.jsonl``, ``results-SPLIT.json`` and ``report.html``; prints the tables."""
    for split, rows in answered.items():
        write_rows(config.out / f"predictions-{split}.jsonl", rows)
        result = judge(config, split, rows, untrained=before.get(split), **about)
        hub.write_atomically(config.out / f"results-{split}.json", json.dumps(result, indent=2) + "\n")
        for table in tables(result):
            print(f"\n{probe.as_text(table)}")
    if "retention" in about:
        print(f"\n{probe.as_text(retention.table(about['retention']))}")
    print(f"\n{page(config)}")


def dry(config: FinetuneRun) -> FinetuneRun:
    """The same run in miniature: a few generated scenes, the shipped weights, two steps, a temporary folder."""
    out, size = dry_folder(), 128
    corpus = CorpusConfig(
        reader="scenes", out=out / "shards", splits={"train": 16, "test": 8}, scenes=scenes.SceneConfig(size=size)
    )
    images = {"shards": [str(out / "shards/train")], "images": 4 * distributed.world().size, "workers": 0}
    kept = config.retention and config.retention.model_copy(update={"shards": out / "shards/test"})
    changes = {
        "retention": kept,
        "out": out,
        "data": {},
        "corpus": corpus,
        "init": config.init.model_copy(update={"model": SHIPPED}),
        "image_size": size,
        "trunk_options": {},
        "stream": config.stream.model_copy(update=images),
        "evaluation": config.evaluation.model_copy(
            update={
                "splits": {"dry": out / "shards/test"},
                "proposals": "objects",
                "calibrate": config.evaluation.calibrate and "dry",
            }
        ),
        "train": config.train.model_copy(update={"steps": 2, "save_every": 1, "log_every": 1}),
    }
    return config.model_copy(update=changes)


if __name__ == "__main__":
    script(main)
