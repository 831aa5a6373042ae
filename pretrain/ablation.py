"""The paper's claim, small: ``python pretrain/ablation.py CONFIG [key=value …]``.

Trains the same model on the same data for the same steps with all losses, without the box loss, and without regions
and objects, three seeds each, and compares what they can do. Runs that are already finished are not repeated.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from xvlm import hub, probe, report
from xvlm.run import script

VARIANTS = {
    "all losses": [],
    "no box loss": ["task.weights.box_l1=0", "task.weights.box_giou=0"],
    "no regions, no objects": ["streams.region.max_regions=1"],  # the caption, which comes first
}
SEEDS = (0, 1, 2)
NOTE = (
    f"Mean ± standard deviation over {len(SEEDS)} seeds. Every variant sees the same images in the same number of "
    "updates; without regions an image comes with its caption alone."
)
SHOWN = ("text_to_image_r1", "image_to_text_r1", "any_box_acc", "mean_iou", "region_to_text", "text_to_region")


def main(arguments: list[str]) -> None:
    config, *overrides = arguments or [str(Path(__file__).parents[1] / "configs/pretrain/ablation.yaml")]
    out = Path(next((word.removeprefix("out=") for word in overrides if word.startswith("out=")), "runs/ablation"))
    given = [word for word in overrides if not word.startswith("out=")]
    runs = {
        (variant, seed): out / f"{variant.replace(',', '').replace(' ', '-')}-{seed}"
        for variant, seed in product(VARIANTS, SEEDS)
    }

    def train(run: tuple[str, int]) -> None:
        variant, seed = run
        pretraining, log = str(Path(__file__).with_name("train.py")), runs[run].with_suffix(".txt")
        print(f"{variant}, seed {seed}: {runs[run]}", flush=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        # What a variant is comes last: nothing given may undo it.
        fixed = [*VARIANTS[variant], f"out={runs[run]}", f"train.seed={seed}"]
        with log.open("w") as told:
            one_core = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
            command = [sys.executable, pretraining, config, *given, *fixed]
            ended = subprocess.run(command, check=False, env=one_core, stdout=told, stderr=told)
        if ended.returncode:
            sys.exit(f"error: {variant}, seed {seed}: {log.read_text().strip().splitlines()[-1]} ({log})")

    first = next(iter(runs))
    train(first)  # packs the corpus that the others share
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(train, list(runs)[1:]))
    write(out, runs)


def write(out: Path, runs: dict[tuple[str, int], Path]) -> None:
    """``results.json`` with every run's numbers, and a page and terminal tables of mean and spread over the seeds."""
    results = {run: json.loads((folder / "results.json").read_text()) for run, folder in runs.items()}
    slices = sorted({key.split("/")[0] for key in next(iter(results.values())) if "/trained/" in key})
    tables = []
    for name in slices:
        rows = []
        for measure in SHOWN:
            cells = []
            for variant in VARIANTS:
                values = [results[variant, seed][f"{name}/trained/{measure}"] for seed in SEEDS]
                cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
            rows.append([probe.MEASURES[measure], *cells])
        tables.append(report.Table(name, ["", *VARIANTS], rows, NOTE))
    about = {key: value for key, value in next(iter(results.values())).items() if "/" not in key and key != "seed"}
    about["commit"] = ", ".join(sorted({result["commit"] for result in results.values()}))
    about["minutes"] = round(sum(result["minutes"] for result in results.values()), 1)
    flat = {f"{variant}/{seed}/{key}": value for (variant, seed), row in results.items() for key, value in row.items()}
    hub.write_atomically(out / "results.json", json.dumps(about | flat, indent=2) + "\n")
    report.write_report(out, title="Which losses teach what", tables=tables, facts=about)
    for table in tables:
        print(f"\n{probe.as_text(table)}")
    print(f"\n{out / 'report.html'}")


if __name__ == "__main__":
    script(main)
