"""What a pre-trained model can do as it stands: retrieval, grounding and region matching on held-out records."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Protocol, runtime_checkable

import torch
from PIL import Image
from pydantic import Field

from xvlm import evaluate, hub, report, runlog, viz
from xvlm.config import Configured
from xvlm.data.images import decode_image
from xvlm.data.processor import Processor
from xvlm.data.shards import BrokenSample, Shards
from xvlm.grounder import Method
from xvlm.models.xvlm import XVLM
from xvlm.prose import counted

Numbers = dict[str, float]
Count = Annotated[int, Field(ge=1)]
_CPU = torch.device("cpu")


class Slice(Configured):
    """Records to evaluate on: a folder of shards, all of it or those with a tag."""

    shards: Path
    tag: str | None = None


class ProbeConfig(Configured):
    slices: dict[str, Slice] = {}
    gallery: Count = 200  # images in the retrieval gallery
    captions: Count = 1  # captions per image that take part
    top_k: Count = 16  # candidates the matching head re-ranks
    grounding: Count = 200  # records whose phrases are asked for
    untrained: bool = True  # also measure the model as it starts


@runtime_checkable
class Probed(Method, Protocol):
    """A model with all its heads, and a way to ground with it: the task that it is pre-trained for."""

    model: XVLM


def probe(task: Probed, processor: Processor, config: ProbeConfig) -> tuple[dict[str, Numbers], dict[str, list]]:
    """Numbers per slice, and per slice the answered grounding queries (for drawing).

    What a slice says nothing about (no captions, no boxes) is not measured.
    """
    model, was_training = task.model, task.model.training
    model.eval()
    numbers, answered = {}, {}
    for name, part in config.slices.items():
        shards = Shards(part.shards)
        indices = [i for i in range(len(shards)) if part.tag is None or part.tag in _tags(shards, i)]
        if not indices:
            raise ValueError(f"evaluation.slices.{name}: no record in {part.shards} has the tag {part.tag!r}")
        numbers[name] = {}
        if shards.counts["captions"]:
            gallery = indices[: config.gallery]
            found = evaluate.retrieval(model, processor, shards, gallery, captions=config.captions, top_k=config.top_k)
            numbers[name] |= found.numbers | _as_chance(evaluate.retrieval_chance(found.rows))
        answered[name] = evaluate.grounding(task, processor, shards, indices[: config.grounding])
        if answered[name]:
            whole = evaluate.grounding_numbers(evaluate.whole_images(answered[name], shards))
            del whole["phrases"]
            numbers[name] |= evaluate.grounding_numbers(answered[name]) | _as_chance(whole)
        numbers[name] |= _regions(evaluate.region_matching(model, processor, shards, indices[: config.grounding]))
    model.train(was_training)
    return numbers, answered


def _tags(shards: Shards, i: int) -> list[str]:
    try:
        return shards.read(i)[0].tags
    except BrokenSample:  # has no tag to be chosen by
        return []


def _regions(numbers: Numbers) -> Numbers:
    accuracy = {key: value for key, value in numbers.items() if key != "chance"}
    return accuracy | {f"chance_{key}": numbers["chance"] for key in accuracy}


def _as_chance(numbers: Numbers) -> Numbers:
    return {f"chance_{name}": value for name, value in numbers.items()}


MEASURES = {
    "text_to_image_r1": "text → image R@1",
    "text_to_image_r5": "text → image R@5",
    "text_to_image_r10": "text → image R@10",
    "image_to_text_r1": "image → text R@1",
    "image_to_text_r5": "image → text R@5",
    "image_to_text_r10": "image → text R@10",
    "any_box_acc": "grounding acc@0.5 (any box)",
    "merged_box_acc": "grounding acc@0.5 (merged box)",
    "mean_iou": "grounding mean IoU",
    "region_to_text": "region → text accuracy",
    "text_to_region": "text → region accuracy",
}


def tables(before: dict[str, Numbers], after: dict[str, Numbers]) -> list[report.Table]:
    """One table per slice: untrained, trained, chance."""
    made = []
    for name, numbers in after.items():
        chance = {key: numbers[f"chance_{key}"] for key in MEASURES if f"chance_{key}" in numbers}
        rows = [
            [label, *(f"{row[key]:.3f}" if row else "-" for row in (before.get(name), numbers, chance))]
            for key, label in MEASURES.items()
            if key in numbers
        ]
        made.append(report.Table(name, ["", "untrained", "trained", "chance"], rows, ""))
    return made


def as_text(table: report.Table) -> str:
    """A table for the terminal."""
    rows = [[report.shown(cell) for cell in row] for row in (table.columns, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([table.title, *lines])


def note_commit(out: Path) -> None:
    """Write into a run folder which commit works on it; a run that is continued may have several."""
    file = out / "commits.txt"
    known = file.read_text().split() if file.exists() else []
    if (now := commit()) not in known:
        hub.write_atomically(file, "\n".join([*known, now]) + "\n")


def facts(out: Path, seed: int, minutes: float, device: torch.device = _CPU) -> dict[str, str | float | int]:
    """Provenance: what produced the numbers of a run; its commits are those noted in the run folder."""
    return {
        "commit": ", ".join((out / "commits.txt").read_text().split()),
        "seed": seed,
        "machine": f"{platform.machine()}, {counted(os.cpu_count() or 1, 'core')}, {_processor_name()}",
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "minutes": round(minutes, 2),
    }


def commit() -> str:
    """The checkout's commit, with a plus sign where files differ from it; "unknown" outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no").strip()
        return git("rev-parse", "--short=10", "HEAD").strip() + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def write(
    out: Path,
    title: str,
    before: dict[str, Numbers],
    after: dict[str, Numbers],
    answered: dict[str, list],
    config: ProbeConfig,
    about: dict,
) -> list[report.Table]:
    """``results.json`` (flat keys) and ``report.html`` in the run folder."""
    flat = dict(about)
    for stage, numbers in (("untrained", before), ("trained", after)):
        flat |= {f"{name}/{stage}/{key}": v for name, row in numbers.items() for key, v in row.items()}
    hub.write_atomically(out / "results.json", json.dumps(flat, indent=2) + "\n")
    made = tables(before, after)
    log = runlog.read_log(out)
    losses = sorted({key for line in log for key in line if "/" in key})
    curves = viz.curves(log, losses) if losses else None
    galleries = [
        gallery
        for name, queries in answered.items()
        if queries
        for gallery in _galleries(name, Shards(config.slices[name].shards), queries)
    ]
    report.write_report(out, title=title, tables=made, curves=curves, pictures=galleries, facts=about)
    return made


def _galleries(name: str, shards: Shards, queries: Sequence[evaluate.Query]) -> list[report.Gallery]:
    """Typical answers (every n-th), and the worst."""
    step = max(1, len(queries) // 12)
    worst = sorted(queries, key=lambda query: query.iou)[:6]
    return [
        report.Gallery(f"{name}: a sample of phrases", [drawn(shards, query) for query in queries[::step][:12]]),
        report.Gallery(f"{name}: the worst", [drawn(shards, query) for query in worst]),
    ]


def drawn(shards: Shards, query: evaluate.Query) -> tuple[Image.Image, str]:
    """An answered phrase's picture with the box found and the true ones (dashed), and its caption."""
    image = decode_image(shards.read(query.index)[1])
    picture = viz.draw(image, torch.tensor([query.predicted_xyxy]), true_xyxy=torch.tensor(query.boxes_xyxy))
    return picture, f"{query.text} (IoU {query.iou:.2f})"
