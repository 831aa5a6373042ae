"""The ``xvlm`` command."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from xvlm import hub
from xvlm.config import ConfigError, validate
from xvlm.data.shards import BrokenSample

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
data = typer.Typer(no_args_is_help=True, help="Sources of data and shards.")
app.add_typer(data, name="data")
bench = typer.Typer(no_args_is_help=True, help="What things cost on this machine.")
app.add_typer(bench, name="bench")

DEFAULT = "xvlm-scenes-tiny"


@app.command()
def demo(
    ablation: Annotated[bool, typer.Option(help="Compare all losses, no box loss, no regions; three seeds.")] = False,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value over configs/pretrain/demo.yaml")] = None,
) -> None:
    """Pre-train a small model on generated scenes and show what it learned (from a checkout of the repository)."""
    script = _in_checkout("pretrain/ablation.py" if ablation else "pretrain/train.py")
    config = _in_checkout(f"configs/pretrain/{'ablation' if ablation else 'demo'}.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command = [sys.executable] if ablation else [*launch, "--mixed_precision", "no", "--dynamo_backend", "no"]
    raise SystemExit(subprocess.run([*command, str(script), str(config), *(overrides or [])], check=False).returncode)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of fine-tuning runs; of several, the numbers compared.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the page. Default: the run's own, or comparison.")] = None,
) -> None:
    """Write a page about a run: numbers, slices, curves, best and worst answers drawn (from a checkout)."""
    words = [*map(str, runs), *([] if out is None else [f"out={out}"])]
    command = [sys.executable, str(_in_checkout("finetune/pages.py")), *words]
    raise SystemExit(subprocess.run(command, check=False).returncode)


def _in_checkout(name: str) -> Path:
    """A script or configuration, which the package does not hold."""
    file = Path(__file__).parents[1] / name
    if not file.exists():
        raise FileNotFoundError(f"{file}: this runs from a checkout of the repository (pip install -e .)")
    return file


@app.command()
def ground(
    image: Annotated[Path, typer.Argument(help="A picture.")],
    phrases: Annotated[list[str], typer.Argument(help="What to look for, one or more phrases.")],
    model: Annotated[str, typer.Option(help="Folder, shipped name or hub name.")] = DEFAULT,
    out: Annotated[Path, typer.Option(help="Where the drawn picture goes.")] = Path("grounded.png"),
    method: Annotated[str, typer.Option(help="box: the box head; gradcam: where the matching head looks.")] = "box",
    layer: Annotated[
        int | None,
        typer.Option(min=0, help="Of gradcam: which cross layer. Default: what xvlm layers stored, else the middle."),
    ] = None,
    words: Annotated[bool, typer.Option(help="Also draw where the matching head looks for each word.")] = False,
) -> None:
    """Find phrases in a picture: prints a box each (left top right bottom, pixels) and draws them."""
    import torch
    from PIL import Image

    from xvlm import viz
    from xvlm.data.processor import Processor
    from xvlm.grounder import Grounder
    from xvlm.models.xvlm import XVLM
    from xvlm.presence import Presence, WithPresence
    from xvlm.tasks import grounding, pretraining
    from xvlm.zeroshot.gradcam import BestLayer, GradCAM, GradCAMConfig, word_maps

    if layer is not None and method != "gradcam" and not words:
        raise ValueError("--layer is for --method gradcam and --words")
    picture = Image.open(image).convert("RGB")
    folder = hub.locate(model)
    weights, processor = XVLM.from_pretrained(folder), Processor.from_pretrained(folder)
    _check_together(processor, weights.config)
    if words or method == "gradcam":
        best = BestLayer.from_pretrained(folder) if layer is None else BestLayer(layer=layer)
        looking = GradCAM(GradCAMConfig(layer=best and best.layer), weights)
    if method == "gradcam":
        way = looking
    elif method != "box":
        raise ValueError(f"--method {method}: expected box or gradcam")
    elif "box_head" not in weights.config.heads:
        raise ValueError(f"{folder}: the model has no box_head; --method gradcam needs none")
    elif "itm_head" in weights.config.heads:
        way = pretraining.Task(pretraining.PretrainingConfig(), weights)
    else:
        way = grounding.Task(grounding.GroundingConfig(), weights)
    known = Presence.from_pretrained(folder)
    if isinstance(way, pretraining.Task) and known is not None:
        way = WithPresence(way, weights, known)
    grounder = Grounder(way, processor)
    grounder.set_image(picture)
    found = grounder.predict_all(phrases)
    labels = list(phrases)
    for i, each in enumerate(found):
        box = " ".join(f"{edge:.0f}" for edge in each.boxes_xyxy[0].tolist())
        sure = ""
        if isinstance(way, WithPresence):  # what other methods say of presence was not calibrated
            there = each.presence >= known.threshold
            sure = f"  {'there' if there else 'not there'} ({each.presence:.2f})"
            labels[i] += "" if there else ": not there"
        typer.echo(f"{phrases[i]}: {box}{sure}")
    if found[0].heat is None:
        drawn = viz.draw(picture, torch.cat([each.boxes_xyxy for each in found]), labels)
    else:
        drawn = viz.contact_sheet([viz.draw(viz.heatmap(picture, each.heat), each) for each in found], phrases)
    drawn.save(out)
    typer.echo(str(out))
    if words:
        with torch.no_grad():
            concepts = weights.eval().encode_image(processor.pixel_values(picture)[None])
        # In the last layer nobody reads what words but [CLS] saw.
        read = looking.layer if layer is not None else min(looking.layer, max(0, len(weights.cross.layers) - 2))
        maps = [(phrase, word_maps(weights, processor, phrase, concepts, read)) for phrase in phrases]
        strip = out.with_stem(f"{out.stem}-words")
        viz.heat_of_words(picture, maps).save(strip)
        typer.echo(str(strip))


@app.command()
def calibrate(
    model: Annotated[Path, typer.Argument(help="A folder of weights; what is found is stored in it.")],
    shards: Annotated[Path, typer.Argument(help="Held-out shards with expressions that name something and nothing.")],
    limit: Annotated[int, typer.Option(min=2, help="Records at most.")] = 1000,
) -> None:
    """Learn from held-out phrases how sure a model should be that a phrase is in an image at all.

    Every other record teaches; the numbers are of the rest.
    """
    from xvlm import presence
    from xvlm.data.processor import Processor
    from xvlm.data.shards import Shards
    from xvlm.models.xvlm import XVLM
    from xvlm.tasks.pretraining import PretrainingConfig, Task

    weights, processor = XVLM.from_pretrained(model), Processor.from_pretrained(model)
    if missing := {"box_head", "itm_head"} - set(weights.config.heads):
        raise ValueError(f"{model}: presence needs a box head and a matching head; there is no {sorted(missing)[0]}")
    packed = Shards(shards)
    count = min(limit, len(packed))
    method = Task(PretrainingConfig(), weights).eval()
    taught, held_out = (presence.gather(method, weights, processor, packed, range(first, count, 2)) for first in (0, 1))
    found = presence.fit(*taught)
    found.save_pretrained(model)
    for name, value in presence.numbers(found, *held_out).items():
        typer.echo(f"{name}: {value:.3f}")
    typer.echo(f"{model / found.FILE}: threshold {found.threshold:.3f}, on {len(held_out[1])} phrases")


@app.command()
def layers(
    model: Annotated[str, typer.Argument(help="Folder, shipped name or hub name.")],
    shards: Annotated[Path, typer.Argument(help="Held-out shards with phrases that have boxes.")],
    proposals: Annotated[str, typer.Option(help="Boxes to choose among: objects, none, or a file.")] = "objects",
    limit: Annotated[int, typer.Option(min=1, help="Records at most.")] = 1000,
    alpha: Annotated[float, typer.Option(min=0, max=1, help="A box is worth its heat over area ** alpha.")] = 0.5,
    pool: Annotated[str, typer.Option(help="How heat in a box is summed: cells or pixels.")] = "cells",
    store: Annotated[bool, typer.Option(help="Keep the best layer with the weights.")] = False,
) -> None:
    """Ground by Grad-CAM at every cross layer: which one finds most?"""
    from xvlm import evaluate, probe, report
    from xvlm.data.processor import Processor
    from xvlm.data.proposals import reader
    from xvlm.data.shards import Shards
    from xvlm.models.xvlm import XVLM
    from xvlm.zeroshot.gradcam import BestLayer, GradCAM, GradCAMConfig

    propose = reader(proposals if proposals in ("objects", "none") else Path(proposals))
    folder = hub.locate(model)
    weights, processor, packed = XVLM.from_pretrained(folder), Processor.from_pretrained(folder), Shards(shards)
    found = []
    for layer in range(len(weights.cross.layers)):
        asked = {"layer": layer, "alpha": alpha, "pool": pool}
        method = GradCAM(validate(GradCAMConfig, asked, "xvlm layers"), weights)
        answers = evaluate.grounding(method, processor, packed, range(min(limit, len(packed))), proposals=propose)
        found.append(evaluate.referring_numbers(answers))
    measures = ("acc@0.5", "pointing_game", "energy_in_box")
    best = max(range(len(found)), key=lambda layer: found[layer]["acc@0.5"])
    rows = [
        [f"{layer}{' *' if layer == best else ''}", *(f"{numbers[name]:.3f}" for name in measures)]
        for layer, numbers in enumerate(found)
    ]
    title = f"{len(answers)} phrases of {shards}, proposals: {proposals}"
    typer.echo(probe.as_text(report.Table(title, ["layer", *measures], rows)))
    if store:
        BestLayer(layer=best).save_pretrained(folder)
        typer.echo(f"{folder / BestLayer.FILE}: layer {best}")


@app.command()
def embed(
    paths: Annotated[list[Path], typer.Argument(help="Pictures, and folders of pictures.")],
    out: Annotated[Path, typer.Option(help="Where the vectors go: .npz or .parquet.")] = Path("vectors.npz"),
    boxes: Annotated[Path | None, typer.Option(help='Boxes of them: {"image": …, "boxes_xyxy": …} a line.')] = None,
    model: Annotated[str, typer.Option(help="Folder, shipped name or hub name.")] = DEFAULT,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Write unit vectors of pictures and of boxes in them; pictures that cannot be read are named (status 1)."""
    import torch

    from xvlm import embed as embedding
    from xvlm.data.processor import Processor
    from xvlm.models.xvlm import XVLM

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: torch cannot use it here: {str(error).splitlines()[0]}") from None
    write, images = embedding.writer_for(out), embedding.find_images(paths)
    asked = embedding.read_boxes(boxes, images) if boxes is not None else {}
    folder = hub.locate(model)
    loaded, processor = XVLM.from_pretrained(folder).to(device), Processor.from_pretrained(folder)
    vectors = embedding.embed(loaded, processor, images, asked, batch_size=batch_size, progress=True)
    write(vectors, model, out)
    for line in vectors.skipped:
        typer.echo(f"skipped {line}")
    count = len(images) - len(vectors.skipped)
    typer.echo(
        f"{out}: {count} images, {len(vectors.ids) - count} boxes, vectors of {vectors.vectors.shape[1]}"
        + (f"; {len(vectors.skipped)} images skipped" if vectors.skipped else "")
    )
    raise typer.Exit(1 if vectors.skipped else 0)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    folder: Annotated[Path, typer.Argument(help="Where the weights go; its name becomes the model's.")],
    half: Annotated[bool, typer.Option(help="Store float16: half the size.")] = False,
    data_used: Annotated[str, typer.Option("--data", help="For the card: what it was trained on, in words.")] = "",
    licence: Annotated[str, typer.Option(help="For the card: a name (BSD-3-Clause), or words.")] = "",
    language: Annotated[list[str] | None, typer.Option(help="For the card, of the texts: en.")] = None,
) -> None:
    """Write a run's model as a folder to share: weights, processor, and a card with data, licence and numbers."""
    import torch

    from xvlm.data.processor import Processor
    from xvlm.models import checkpoints
    from xvlm.run import card

    stored, known = "float16" if half else "float32", card(run)
    said = {"about": f"Stored as {stored}.", "licence": licence, "languages": tuple(language or [])}
    said["data"] = "\n\n".join(filter(None, [data_used, known.data]))
    model = checkpoints.load(run / "model")
    model.save_pretrained(folder, dtype=getattr(torch, stored), card=replace(known, **said))
    Processor.from_pretrained(run / "model").save_pretrained(folder)
    size = (folder / "model.safetensors").stat().st_size / 1e6
    typer.echo(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters, {size:.1f} MB ({stored})")


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="An official checkpoint of X-VLM or ALBEF, .th or .pth.")],
    folder: Annotated[Path, typer.Argument(help="Where the weights go; its name becomes the model's.")],
    image_size: Annotated[
        int | None, typer.Option(help="Pixels; position tables are resized. Default: its own.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder with vocab.txt or tokenizer.json, or a hub name. Default: beside FILE.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads of the text side and of a ViT. Default: width / 64.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Start this task's model from a pre-training file: retrieval, vqa, …")
    ] = None,
) -> None:
    """Turn an official checkpoint into a folder of ours, and say what became of each tensor."""
    from xvlm.data.processor import Processor, ProcessorConfig
    from xvlm.models import checkpoints

    converted = checkpoints.read(file, image_size=image_size, heads=heads, task=task)
    processor = None
    beside = any((file.parent / name).exists() for name in ("vocab.txt", "tokenizer.json"))
    if tokenizer is not None or beside:
        given = {
            key: converted.trained_with[key] for key in ("max_tokens", "max_words") if key in converted.trained_with
        }
        asked = {"image_size": converted.config.vision.image_size, **given}
        config = validate(ProcessorConfig, asked, f"{file}, its config")
        processor = Processor.from_tokenizer(hub.locate(tokenizer) if tokenizer else file.parent, config)
        _check_together(processor, converted.config)
    model = checkpoints.build(converted, file)
    typer.echo(f"{file}: {converted.kind}")
    for line in converted.lines():
        typer.echo(line)
    model.save_pretrained(folder, card=checkpoints.card(file, converted))
    if processor is None:
        typer.echo("no tokenizer: give one with --tokenizer before the folder is used with texts")
    else:
        processor.save_pretrained(folder)
    counts = f"{len(converted.renamed)} renamed, {len(converted.dropped)} dropped, {len(converted.resized)} resized"
    if converted.fresh:
        counts += f", {len(converted.fresh)} started fresh"
    typer.echo(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters; {counts}")


@app.command()
def verify(folder: Annotated[str, typer.Argument(help="Folder, shipped name or hub name.")]) -> None:
    """Check that a folder loads right on this machine: what its weights answer is what they answered when written."""
    raise typer.Exit(0 if _verified(folder) else 1)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A folder written by export or convert.")],
    name: Annotated[str, typer.Argument(help="org/model on the hub.")],
    private: Annotated[bool, typer.Option(help="Make the repository private if it is new.")] = False,
) -> None:
    """Upload a folder to the hub, once it is known to load right."""
    if not _verified(str(folder)):
        raise typer.Exit(1)
    typer.echo(hub.push(folder, name, private=private))


def _verified(folder: str) -> bool:
    """Prints how far each golden output is from what it was; whether all are near."""
    from xvlm.data.processor import FILE, Processor
    from xvlm.models import checkpoints, golden

    place = hub.locate(folder)
    model = checkpoints.load(place)
    if any((place / name).exists() for name in (FILE, "tokenizer.json")):  # one alone is half a processor
        _check_together(Processor.from_pretrained(place), model.config)
    differences, near = golden.differences(model, place)
    for name, difference in differences.items():
        typer.echo(f"{name}: {difference:.1e}")
    verdict = "loads right" if near else f"DOES NOT LOAD RIGHT (within {golden.TOLERANCE:.0e} it would)"
    typer.echo(f"{folder}: largest difference {max(differences.values()):.1e}, {verdict}")
    return near


def _check_together(processor, config) -> None:
    """Whether a processor makes what the model with this configuration takes."""
    tokenizer, embedding = processor.vocab_size, config.text.vocab_size
    if tokenizer != embedding:
        raise ValueError(
            f"the tokenizer has {tokenizer} words, the model's embedding {embedding}: they do not belong together"
        )
    made, taken = processor.config.image_size, config.vision.image_size
    if made != taken:
        raise ValueError("the processor makes images of {} x {} pixels, the model takes {} x {}".format(*made, *taken))


@data.command("pack")
def data_pack(
    reader: Annotated[str, typer.Argument(help="scenes, coco, csv_table, ...: docs/data.md has all.")],
    out: Annotated[Path, typer.Argument(help="Shards go to OUT/SPLIT.")],
    folder: Annotated[Path | None, typer.Option(help="Folder of the public data.")] = None,
    split: Annotated[str, typer.Option(help="Which part.")] = "train",
    limit: Annotated[int | None, typer.Option(help="Records at most (scenes need a number).")] = None,
    allow_missing: Annotated[bool, typer.Option(help="Leave absent photographs out, and say which.")] = False,
    masks: Annotated[bool, typer.Option(help="Of the reader coco: keep the outlines of objects too.")] = False,
    allow_broken: Annotated[bool, typer.Option(help="Leave images out that cannot be decoded, and say which.")] = False,
    max_side: Annotated[int | None, typer.Option(min=1, help="Make larger images smaller: pixels.")] = None,
    avoid: Annotated[list[Path] | None, typer.Option(help="Packed evaluation set, none of whose images go in.")] = None,
    leaks: Annotated[str, typer.Option(help="drop, or report: pack them all the same.")] = "drop",
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that decode. Default: one a core.")] = None,
) -> None:
    """Pack a source into tar shards. Packing that was interrupted goes on where it was."""
    from xvlm.data.pack import CorpusConfig, pack
    from xvlm.data.shards import REMARKS, read_remarks

    asked = {"reader": reader, "out": out, "folder": folder, "splits": {split: limit}, "allow_missing": allow_missing}
    asked |= {"masks": masks, "allow_broken": allow_broken, "max_side": max_side, "avoid": avoid or [], "leaks": leaks}
    asked["workers"] = _cores() if workers is None else workers
    config = validate(CorpusConfig, asked, "xvlm data pack")
    packed = pack(config)[split]
    said = Counter((remark.why, remark.packed) for remark in read_remarks(out / split))
    for (why, kept), count in said.items():
        outcome = "packed all the same" if kept else "left out"
        typer.echo(f"{why}: {count} {outcome}, listed in {out / split / REMARKS}")
    if config.avoid and not any(why == "leak" for why, _ in said):
        typer.echo("leak: 0")
    typer.echo(f"{out / split}: {len(packed)} records")


@data.command("check")
def data_check(
    folder: Annotated[str, typer.Argument(help="Shards, or tars (path, URL, pipe:); with --reader, a source.")],
    reader: Annotated[str | None, typer.Option(help="What reads the source.")] = None,
    split: Annotated[str, typer.Option(help="Which part of the source.")] = "train",
    allow_missing: Annotated[bool, typer.Option(help="Absent photographs are no problem.")] = False,
    ignore: Annotated[list[str] | None, typer.Option(help="A kind of problem that is none here.")] = None,
    max_words: Annotated[int, typer.Option(min=1, help="Of a text.")] = 40,
    near_duplicates: Annotated[bool, typer.Option(help="List images that look like an earlier one, too.")] = False,
    fix: Annotated[Path | None, typer.Option(help="Pack to this folder, with what is safe to put right.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that decode. Default: one a core.")] = None,
) -> None:
    """List every problem of shards or of a source. Ends with status 1 where there are any (left, once fixed)."""
    from xvlm.data import check
    from xvlm.data.pack import CorpusConfig, read
    from xvlm.data.problems import KINDS

    if unknown := set(ignore or []) - set(KINDS):
        raise ValueError(
            f"--ignore {', '.join(sorted(unknown))}: no such kind of problem; there are {', '.join(KINDS)}"
        )
    if reader is None:
        items = check.packed(_packed(folder))
    else:
        asked = {"reader": reader, "out": folder, "folder": folder, "splits": {split: None}}
        config = validate(CorpusConfig, asked | {"allow_missing": allow_missing}, "xvlm data check")
        items = check.read(read(config, split, None), folder)
    report = check.check(
        items,
        max_words=max_words,
        near_duplicates=near_duplicates,
        ignore=set(ignore or []),
        workers=_cores() if workers is None else workers,
        fix=fix,
        progress=True,
    )
    for line in [*map(str, report.problems), *report.summary()]:
        typer.echo(line)
    if fix is not None:
        typer.echo(f"{fix}: {len(report.changes)} changes, listed in {fix / check.CHANGES}")
    typer.echo(f"{folder}: {report.records} records, {len(report.problems)} problems{' left' if fix else ''}")
    raise typer.Exit(1 if report.problems else 0)


@data.command("stats")
def data_stats(
    shards: Annotated[str, typer.Argument(help="Shards, or tars (path, URL, pipe:).")],
    plots: Annotated[Path | None, typer.Option(help="Where a picture of the distributions goes.")] = None,
) -> None:
    """Count records, texts, boxes and words, per source and kind."""
    from xvlm.data import stats

    counted = stats.count(_packed(shards))
    for line in counted.lines():
        typer.echo(line)
    if plots is not None:
        from xvlm import viz

        plots.write_bytes(viz.histograms(counted.distributions()))
        typer.echo(str(plots))


def _packed(entry: str) -> Path:
    """The folder with the index of shards, which tars get in the cache."""
    from xvlm.data import tars
    from xvlm.data.cache import Cache

    return tars.locate(entry, Cache())


def _cores() -> int:
    """Processes that may run at once, as far as this one may know."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@data.command("schema")
def data_schema() -> None:
    """Print the JSON schema of a record: the fields of json_lines and of the shards."""
    from xvlm.data.records import Record

    typer.echo(json.dumps(Record.model_json_schema(), indent=2))


@data.command("index")
def data_index(
    tars: Annotated[list[str], typer.Argument(help="Paths, URLs or pipe: commands; {000..099} and * for many.")],
    out: Annotated[Path, typer.Option(help="The index goes to this folder, which then counts as packed.")],
    cache: Annotated[Path, typer.Option(help="What is fetched is kept here.")] = Path("~/.cache/xvlm"),
    gigabytes: Annotated[float, typer.Option(help="How much is kept; what was not read for longest goes.")] = 50.0,
) -> None:
    """Make tars of others (webdataset's layout) readable like packed ones."""
    from xvlm.data.cache import Cache
    from xvlm.data.tars import expand, write_index

    index = write_index(expand(tars), out, Cache(folder=cache, gigabytes=gigabytes))
    typer.echo(f"{out}: {index.counts['records']} records in {len(index.shards)} tars")


@data.command("show")
def data_show(
    shards: Annotated[str, typer.Argument(help="Shards, or tars (path, URL, pipe:).")],
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("records.png"),
    count: Annotated[int, typer.Option(help="How many records.")] = 12,
    kind: Annotated[list[str] | None, typer.Option(help="regions, objects, ... Default: all with boxes.")] = None,
) -> None:
    """A contact sheet of records: for each kind of text, its boxes drawn and what is said of them."""
    from xvlm import viz
    from xvlm.data.images import decode_image
    from xvlm.data.shards import Shards
    from xvlm.data.stats import said_in

    packed = Shards(_packed(shards))
    pictures, captions = [], []
    for i in range(min(count, len(packed))):
        record, image = packed.read(i)
        try:
            picture = decode_image(image)
        except ValueError as error:
            raise ValueError(f"{shards}: record {record.id}: {error}") from None
        first = record.captions[0] if record.captions else record.id
        said = said_in(record)
        chosen = kind or [name for name, each in said.items() if any(one.boxes_xyxy for one in each)]
        for name in chosen or ["captions"]:
            things = [("; ".join(one.texts), one.boxes_xyxy) for one in said.get(name, [])]
            drawn, legend = viz.numbered(picture, things)
            pictures.append(drawn)
            captions.append(f"{first}\n{name}:\n{legend}")
    viz.contact_sheet(pictures, captions).save(out)
    typer.echo(str(out))


@bench.command("step")
def bench_step(
    size: Annotated[str, typer.Option(help="tiny, small, or base (Swin-B and BERT-base).")] = "small",
    images: Annotated[int, typer.Option(min=1, help="Images of the batch.")] = 4,
    texts_per_image: Annotated[int, typer.Option(min=1, help="The first about the image, the rest about regions.")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU. Default: torch's own choice.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 (autocast).")] = "fp32",
    repeats: Annotated[int, typer.Option(min=1, help="Times are medians over them.")] = 5,
    clock: Annotated[str, typer.Option(help="wall, or cpu: processor time, for a busy machine; one thread.")] = "wall",
    peak_tflops: Annotated[float | None, typer.Option(help="Of the device, for MFU. Default: of known GPUs.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the numbers go as well.")] = None,
) -> None:
    """Time, memory and FLOPs of a pre-training step, beside the same step written the naive way."""
    from functools import partial

    import torch

    from xvlm.bench import step
    from xvlm.tasks.pretraining import PretrainingConfig, Task

    if threads is not None:
        torch.set_num_threads(threads)
    result = step.bench_step(
        size,
        lambda model: partial(Task(PretrainingConfig(), model).losses, boxes=True),
        images=images,
        texts_per_image=texts_per_image,
        device=device,
        precision=precision,
        repeats=repeats,
        clock=clock,
        peak_tflops=peak_tflops,
    )
    _report(result, json_file)


@bench.command("retrieval")
def bench_retrieval(
    size: Annotated[str, typer.Option(help="tiny, small, or base (Swin-B and BERT-base).")] = "small",
    images: Annotated[int, typer.Option(min=1, help="Of the gallery.")] = 16,
    texts_per_image: Annotated[int, typer.Option(min=1, help="Of the gallery.")] = 5,
    top_k: Annotated[int, typer.Option(min=1, help="How many candidates of a query are re-ranked.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU. Default: torch's own choice.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times are medians over them.")] = 3,
    clock: Annotated[str, typer.Option(help="wall, or cpu: processor time, for a busy machine; one thread.")] = "wall",
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the numbers go as well.")] = None,
) -> None:
    """Time and FLOPs of re-ranking a gallery both ways, beside the same done a query at a time."""
    import torch

    from xvlm.bench import retrieval

    if threads is not None:
        torch.set_num_threads(threads)
    result = retrieval.bench_retrieval(
        size,
        images=images,
        texts_per_image=texts_per_image,
        top_k=top_k,
        device=device,
        repeats=repeats,
        clock=clock,
    )
    _report(result, json_file)


@bench.command("data")
def bench_data(
    shards: Annotated[Path | None, typer.Argument(help="A packed folder. Default: photographs made here.")] = None,
    images: Annotated[int, typer.Option(min=1, help="How many, at most; whole batches are read.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Images of a batch.")] = 32,
    size: Annotated[int, typer.Option(min=1, help="Height and width that a model wants.")] = 224,
    tokenizer: Annotated[str, typer.Option(help="Folder, shipped name or hub name of the words.")] = DEFAULT,
    repeats: Annotated[int, typer.Option(min=1, help="Times are medians over them.")] = 5,
    clock: Annotated[str, typer.Option(help="wall, or cpu: processor time, for a busy machine.")] = "wall",
    made: Annotated[tuple[int, int], typer.Option(help="Width and height of the photographs made here.")] = (640, 480),
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the numbers go as well.")] = None,
) -> None:
    """Samples a core reads, decodes and augments per second, beside the same images by Pillow and torchvision."""
    import torch

    from xvlm.bench import data as reading
    from xvlm.data.processor import Processor, ProcessorConfig

    torch.set_num_threads(1)
    processor = Processor.from_tokenizer(hub.locate(tokenizer), ProcessorConfig(image_size=size))
    asked = {"images": images, "batch": batch, "repeats": repeats, "clock": clock, "made": made}
    result = reading.bench_data(shards, processor, **asked)
    _report(result, json_file)


def _report(result, json_file: Path | None) -> None:
    for line in result.lines():
        typer.echo(line)
    if json_file is not None:
        hub.write_atomically(json_file, json.dumps(result.json(), indent=2) + "\n")


@bench.command("memory")
def bench_memory(
    size: Annotated[str, typer.Option(help="tiny, small, or base (Swin-B and BERT-base).")] = "base",
    device: Annotated[str, typer.Option(help="cuda or cuda:N measures; cpu counts tensors.")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32, or bf16 (autocast).")] = "bf16",
    batches: Annotated[tuple[int, int], typer.Option(help="Images of the two batches to go by.")] = (4, 8),
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the numbers go as well.")] = None,
) -> None:
    """Memory of a pre-training update, and the largest batch on cards of 12, 24, 48 and 80 GB."""
    from xvlm.bench import memory
    from xvlm.tasks.pretraining import PretrainingConfig, Task

    def task(model):
        return Task(PretrainingConfig(), model)

    result = memory.bench_memory(size, task, device=device, precision=precision, batches=batches)
    for line in result.lines():
        typer.echo(line)
    if json_file is not None:
        hub.write_atomically(json_file, json.dumps(result.json(), indent=2) + "\n")


def main() -> None:
    try:
        app()
    except (ConfigError, ValueError, OSError, BrokenSample) as error:
        named = isinstance(error, OSError) and error.errno is not None and error.filename is not None
        sys.exit(f"error: {error.filename}: {error.strerror}" if named else f"error: {error}")


if __name__ == "__main__":
    main()
