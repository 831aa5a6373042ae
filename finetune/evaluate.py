"""Evaluate a task: ``accelerate launch finetune/evaluate.py CONFIG [split=test] [model=FOLDER] [key=value …]``.

Asks the weights that ``finetune/train.py CONFIG`` left, or those of ``model``, every example of a split once, whatever
the number of processes; prints tables and writes ``predictions-SPLIT.jsonl``, ``results-SPLIT.json`` and
a new ``report.html`` to the run folder. With ``predictions=FILE`` it scores predictions that were written before; no
model is needed. With ``submission=FILE`` it also writes what the benchmark's server takes.
"""

import json
from pathlib import Path

from pages import page
from runs import FinetuneRun, ask, facts, judge, load, read_rows, shards_of, tables, weights, write_rows

from xvlm import distributed, hub, probe, train
from xvlm.config import ConfigError, load_config
from xvlm.run import script

OPTIONS = ("split", "model", "predictions", "submission")


def main(arguments: list[str]) -> None:
    if not arguments:
        raise ConfigError("which configuration? For example configs/finetune/grounding_scenes.yaml")
    given = dict(word.split("=", 1) for word in arguments[1:] if word.split("=")[0] in OPTIONS)
    overrides = [word for word in arguments[1:] if word.split("=")[0] not in OPTIONS]
    config = load_config(FinetuneRun, arguments[0], overrides)
    split = given.get("split", "test")
    shards_of(config, split)  # says at once what is not there
    if "submission" in given and config.recipe.submission is None:
        raise ConfigError(f"submission: no server takes predictions of {config.task.name}")
    if "predictions" in given:
        file = Path(given["predictions"])
        rows = read_rows(config, file)
        submit(config, rows, given)
        show(judge(config, split, rows, predictions=str(file)))
        return
    accelerator = train.make_accelerator(config.train, config.out)
    name = given.get("model", config.out / "model")
    if "model" not in given and not name.exists():
        raise ConfigError(f"{name}: no weights there; train first, or say model=FOLDER")
    task, processor = load(config, name)
    folder = hub.locate(name)
    rows = ask(config, split, task.to(accelerator.device), processor, folder)
    if distributed.world().rank == 0:
        config.out.mkdir(parents=True, exist_ok=True)
        write_rows(config.out / f"predictions-{split}.jsonl", rows)
        submit(config, rows, given)
        result = judge(config, split, rows, weights=weights(name), **facts(config, task, folder))
        hub.write_atomically(config.out / f"results-{split}.json", json.dumps(result, indent=2) + "\n")
        show(result)
        print(page(config))


def submit(config: FinetuneRun, rows: list, given: dict[str, str]) -> None:
    if "submission" in given:
        hub.write_atomically(Path(given["submission"]), json.dumps(config.recipe.submission(rows)))


def show(result: dict) -> None:
    for table in tables(result):
        print(f"{probe.as_text(table)}\n")
    made_with = ("data", "weights", "layer", "proposals", "presence", "predictions", "commit")
    print({key: result[key] for key in made_with if key in result})


if __name__ == "__main__":
    script(main)
