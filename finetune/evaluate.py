"""Evaluate a task: ``accelerate launch finetune/evaluate.py CONFIG [split=test] [model=FOLDER] [key=value …]``.

Asks the weights that ``finetune/train.py CONFIG`` left every example of a split once, whatever the number of
processes; prints tables and writes ``predictions-SPLIT.jsonl``, ``results-SPLIT.json`` and a new ``report.html`` to the
run folder. Of other weights (``model``) they go to a folder in it that is named after these. With ``predictions=FILE``
it scores predictions that were written before, without a model, and writes ``FILE`` with the ending ``.results.json``.
With ``submission=FILE`` it also writes what the benchmark's server takes.
"""

import json
from pathlib import Path
from typing import Any

import retention
from pages import page
from runs import FinetuneRun, ask, facts, fingerprint, judge, load, read_rows, shards_of, tables, write_rows

from xvlm import distributed, hub, probe, train
from xvlm.config import ConfigError, dump_config, load_config
from xvlm.run import check_data, script

OPTIONS = ("split", "model", "predictions", "submission")
MEASURED = ("numbers", "chance", "slices", "commit")  # all else says what was measured, and how


def main(arguments: list[str]) -> None:
    if not arguments:
        raise ConfigError("which configuration? For example configs/finetune/grounding_scenes.yaml")
    given = dict(word.split("=", 1) for word in arguments[1:] if word.split("=")[0] in OPTIONS)
    overrides = [word for word in arguments[1:] if word.split("=")[0] not in OPTIONS]
    config = load_config(FinetuneRun, arguments[0], overrides)
    split = given.get("split", "test")
    shards_of(config, split)  # says at once what is not there
    check_data(config.out)
    if "submission" in given and config.recipe.submission is None:
        raise ConfigError(f"submission: no server takes predictions of {config.task.name}")
    if "predictions" in given:
        file = Path(given["predictions"])
        rows = read_rows(config, file)
        submit(config, rows, given)
        results = file.with_suffix(".results.json")
        show(write(results, judge(config, split, rows, predictions=fingerprint(file))), results)
        return
    accelerator = train.make_accelerator(config.train, config.out)
    name = given.get("model", config.out / "model")
    if "model" not in given and not name.exists():
        raise ConfigError(f"{name}: no weights there; train first, or say model=FOLDER")
    task, processor = load(config, name)
    folder = hub.locate(name)
    told = apart(config, str(name), folder)
    rows = ask(config, split, task.to(accelerator.device), processor, folder)
    if distributed.world().rank == 0:
        if told is not config:
            told.out.mkdir(parents=True, exist_ok=True)
            hub.write_atomically(told.out / "config.yaml", dump_config(told))
        write_rows(told.out / f"predictions-{split}.jsonl", rows)
        submit(config, rows, given)
        result = judge(config, split, rows, weights=fingerprint(name), **facts(config, task, folder))
        result = write(told.out / f"results-{split}.json", result)
        show(result, page(told))


def apart(config: FinetuneRun, name: str, weights: Path) -> FinetuneRun:
    """The run in a folder for other weights than its own, so that these do not take the place of its answers."""
    if weights.resolve() == (config.out / "model").resolve():
        return config
    label = "-".join(weights.resolve().parts[-2:]) if Path(name).exists() else name.replace("/", "-")
    return config.model_copy(update={"out": config.out / label, "title": f"{config.title}: {label}"})


def submit(config: FinetuneRun, rows: list, given: dict[str, str]) -> None:
    if "submission" in given:
        hub.write_atomically(Path(given["submission"]), json.dumps(config.recipe.submission(rows)))


def write(file: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Store a result; what training said of the same weights, examples and settings (before, retained) stays in it."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    same = all(known.get(key) == value for key, value in result.items() if key not in MEASURED)
    result = (known if same else {}) | result
    hub.write_atomically(file, json.dumps(result, indent=2) + "\n")
    return result


def show(result: dict[str, Any], written: Path) -> None:
    for table in tables(result):
        print(f"{probe.as_text(table)}\n")
    if "retention" in result:
        print(f"{probe.as_text(retention.table(result['retention']))}\n")
    for key in ("data", "weights", "layer", "proposals", "presence", "predictions", "commit"):
        if (value := result.get(key)) is not None:
            said = ", ".join(f"{name} {each}" for name, each in value.items()) if isinstance(value, dict) else value
            print(f"{key}: {said}")
    print(written)


if __name__ == "__main__":
    script(main)
