"""The page about a fine-tuning run: ``python finetune/pages.py RUN [RUN …] [out=FOLDER]``, or ``xvlm report``.

Of one run: its numbers and slices, its curves, the best and worst answers drawn, from what training and evaluation left
in its folder; writes ``report.html`` there. Of several: their numbers side by side, in ``out``, by default the folder
``comparison`` beside the first run.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import retention
from runs import FinetuneRun, read_rows, tables
from views import galleries

from xvlm import probe, report, runlog, viz
from xvlm.config import ConfigError, load_config
from xvlm.data.shards import Shards
from xvlm.prose import counted
from xvlm.run import script

FACTS = ("commit", "seed", "machine", "torch", "device", "minutes", "layer", "proposals")


def main(arguments: list[str]) -> None:
    folders = [Path(word) for word in arguments if not word.startswith("out=")]
    out = next((Path(word.removeprefix("out=")) for word in arguments if word.startswith("out=")), None)
    if not folders:
        raise ConfigError("which run? A folder that finetune/train.py wrote, for example runs/grounding-scenes")
    if len(folders) > 1:
        print(compare(folders, out or folders[0].parent / "comparison"))
        return
    results_of(folders[0])  # says at once what is not there
    print(page(load_config(FinetuneRun, folders[0] / "config.yaml", [f"out={folders[0]}"]), out))


def results_of(folder: Path) -> list[dict[str, Any]]:
    """What ``results-SPLIT.json`` say, by the name of the split.

    Raises:
        FileNotFoundError: there are none.
    """
    files = sorted(folder.glob("results-*.json"))
    if not files:
        raise FileNotFoundError(f"{folder}: no results-*.json; finetune/train.py and finetune/evaluate.py write them")
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def page(config: FinetuneRun, out: Path | None = None) -> Path:
    """Write the page about a run to ``out``, by default its own folder."""
    results = results_of(config.out)
    pictures = []
    for result in results:
        split, views = result["split"], config.recipe.views
        rows = read_rows(config, config.out / f"predictions-{split}.jsonl")
        for view in views:
            title = split if len(views) == 1 else f"{split}, {view.headline}"
            pictures += galleries(view, rows, Shards(result["data"]["folder"]), title)
    numbers = [table for result in results for table in tables(result)]
    if "retention" in results[0]:
        numbers.append(retention.table(results[0]["retention"]))
    log = runlog.read_log(config.out)
    keys = sorted({key for line in log for key in line if "/" in key})
    return report.write_report(
        out or config.out,
        title=config.title,
        facts=facts(results),
        tables=numbers,
        curves=viz.curves(log, keys) if keys else None,
        pictures=pictures,
    )


def facts(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What made the numbers; hashes by their first digits, the whole ones are in the results."""
    found: dict[str, Any] = {key: results[0][key] for key in FACTS if key in results[0]}
    if "weights" in results[0]:
        found["weights"] = results[0]["weights"]["sha256"][:12]
    return found | {f"data, {result['split']}": result["data"]["sha256"][:12] for result in results}


def compare(folders: Sequence[Path], out: Path) -> Path:
    """Write a page with the numbers of several runs side by side, a table for each task and split; prints them.

    Numbers of unlike data or protocol under one heading would mislead: they are kept apart, the data by its hash.
    """
    alike: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for folder in folders:
        for result in results_of(folder):
            examples = f"{counted(result['examples'], 'example')}, data {result['data']['sha256'][:12]}"
            if "proposals" in result:
                examples += f", proposals {result.get('proposals_sha256', result['proposals'])}"
            same = (f"{result['task']}, {result['split']}", examples, result["protocol"])
            alike.setdefault(same, {})[str(folder)] = result
    made = []
    for (title, examples, protocol), runs in alike.items():
        names = dict.fromkeys(name for result in runs.values() for name in result["numbers"])
        rows = [[name, *(result["numbers"].get(name) for result in runs.values())] for name in names]
        made.append(report.Table(f"{title} ({examples})", ["", *runs], rows, protocol))
        print(f"{probe.as_text(made[-1])}\n")
    return report.write_report(out, title="Runs side by side", tables=made)


if __name__ == "__main__":
    script(main)
