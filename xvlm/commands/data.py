"""Sources of data and shards: data pack, check, stats, schema, index, show."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from xvlm.config import validate
from xvlm.prose import counted

FILE = "Annotations, where they have another name than the reader looks for; may be repeated."
IMAGES = "Folder of the images, where they are not where the reader looks for them; may be repeated."

app = typer.Typer(no_args_is_help=True, help="Sources of data and shards.")


@app.command()
def pack(
    reader: Annotated[str, typer.Argument(help="scenes, coco, csv_table, ...: docs/data.md has all.")],
    out: Annotated[Path, typer.Argument(help="Shards go to OUT/SPLIT.")],
    folder: Annotated[Path | None, typer.Option(help="Folder of the data. Default: that of the first --file.")] = None,
    split: Annotated[str, typer.Option(help="Which part.")] = "train",
    file: Annotated[list[Path] | None, typer.Option(help=FILE)] = None,
    images: Annotated[list[Path] | None, typer.Option(help=IMAGES)] = None,
    limit: Annotated[int | None, typer.Option(help="Records at most (scenes need a number).")] = None,
    allow_missing: Annotated[bool, typer.Option(help="Leave absent photographs out, and say which.")] = False,
    masks: Annotated[bool, typer.Option(help="Of coco and coco_json: keep the outlines of things too.")] = False,
    allow_broken: Annotated[bool, typer.Option(help="Leave images out that cannot be decoded, and say which.")] = False,
    max_side: Annotated[int | None, typer.Option(min=1, help="Make larger images smaller: pixels.")] = None,
    avoid: Annotated[list[Path] | None, typer.Option(help="Packed evaluation set, none of whose images go in.")] = None,
    leaks: Annotated[str, typer.Option(help="drop, or report: pack them all the same.")] = "drop",
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that decode. Default: one a core.")] = None,
) -> None:
    """Pack a source into tar shards. Packing that was interrupted goes on where it was."""
    from xvlm.data import pack as packing
    from xvlm.data.shards import INDEX, REMARKS, read_remarks

    asked = {"reader": reader, "out": out, "folder": folder, "splits": {split: limit}, "allow_missing": allow_missing}
    asked |= {"files": {split: file} if file else {}, "images": images or []}
    asked |= {"masks": masks, "allow_broken": allow_broken, "max_side": max_side, "avoid": avoid or [], "leaks": leaks}
    asked["workers"] = _cores() if workers is None else workers
    config = validate(packing.CorpusConfig, asked, "xvlm data pack")
    before = (out / split / INDEX).exists()
    try:
        packed = packing.pack(config)[split]
    except KeyboardInterrupt:
        typer.echo("stopped; the same command continues", err=True)
        raise typer.Exit(130) from None
    said = Counter((remark.why, remark.packed) for remark in read_remarks(out / split))
    for (why, kept), count in said.items():
        outcome = "packed all the same" if kept else "left out"
        if why == "statements":
            outcome = "about images that are not packed"
        typer.echo(f"{why}: {count} {outcome}, listed in {out / split / REMARKS}")
        if why == "rotated":
            typer.echo(
                f"look whether their boxes are right: xvlm data show {out / split}; where they are of the turned "
                f"pictures: xvlm data check {out / split} --boxes-turned --fix FOLDER"
            )
    if config.avoid and not any(why == "leak" for why, _ in said):
        typer.echo("leak: 0")
    done = ", packed already: nothing was done" if before else ""
    typer.echo(f"{out / split}: {counted(len(packed), 'record')}{done}")


@app.command()
def check(
    folder: Annotated[str, typer.Argument(help="Shards, or tars (path, URL, pipe:); with --reader, a source.")],
    reader: Annotated[str | None, typer.Option(help="What reads the source.")] = None,
    split: Annotated[str, typer.Option(help="Which part of the source.")] = "train",
    file: Annotated[list[Path] | None, typer.Option(help=FILE)] = None,
    images: Annotated[list[Path] | None, typer.Option(help=IMAGES)] = None,
    allow_missing: Annotated[bool, typer.Option(help="Absent photographs are no problem.")] = False,
    ignore: Annotated[list[str] | None, typer.Option(help="A kind of problem that is none here.")] = None,
    max_words: Annotated[int, typer.Option(min=1, help="Of a text.")] = 40,
    near_duplicates: Annotated[bool, typer.Option(help="List images that look like an earlier one, too.")] = False,
    boxes_turned: Annotated[bool, typer.Option(help="Boxes are of photographs as their EXIF turns them.")] = False,
    fix: Annotated[Path | None, typer.Option(help="Pack to this folder, with what is safe to put right.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that decode. Default: one a core.")] = None,
) -> None:
    """List every problem of shards or of a source. Ends with status 1 where there are any (left, once fixed)."""
    from xvlm.data import check as checking
    from xvlm.data.pack import CorpusConfig, read
    from xvlm.data.problems import KINDS

    if unknown := set(ignore or []) - set(KINDS):
        raise ValueError(
            f"--ignore {', '.join(sorted(unknown))}: no such kind of problem; there are {', '.join(KINDS)}"
        )
    if reader is None:
        items = checking.packed(_packed(folder))
    else:
        asked = {"reader": reader, "out": folder, "folder": folder, "splits": {split: None}}
        asked |= {"files": {split: file} if file else {}, "images": images or [], "allow_missing": allow_missing}
        config = validate(CorpusConfig, asked, "xvlm data check")
        items = checking.read(read(config, split, None), folder)
    report = checking.check(
        items,
        max_words=max_words,
        near_duplicates=near_duplicates,
        boxes_turned=boxes_turned,
        ignore=set(ignore or []),
        workers=_cores() if workers is None else workers,
        fix=fix,
        progress=True,
    )
    if not report.records and not report.problems:
        raise ValueError(f"{folder}: there is nothing to check, not a single record")
    for line in [*map(str, report.problems), *report.summary()]:
        typer.echo(line)
    if fix is not None:
        typer.echo(f"{fix}: {counted(len(report.changes), 'change')}, listed in {fix / checking.CHANGES}")
    records, problems = counted(report.records, "record"), counted(len(report.problems), "problem")
    part = f" of split {split}" if reader else ""
    others = "; other splits were not looked at (--split)" if reader else ""
    typer.echo(f"{folder}: {records}{part}, {problems}{' left' if fix else ''}{others}")
    raise typer.Exit(1 if report.problems else 0)


@app.command()
def stats(
    shards: Annotated[str, typer.Argument(help="Shards, or tars (path, URL, pipe:).")],
    plots: Annotated[Path | None, typer.Option(help="Where a picture of the distributions goes.")] = None,
) -> None:
    """Count records, texts, boxes and words, per source and kind."""
    from xvlm.data.stats import count

    found = count(_packed(shards))
    for line in found.lines():
        typer.echo(line)
    if plots is not None:
        from xvlm import viz

        plots.write_bytes(viz.histograms(found.distributions()))
        typer.echo(str(plots))


@app.command()
def schema(
    lines: Annotated[bool, typer.Option("--lines", help="Of a line for the reader json_lines.")] = False,
) -> None:
    """Print the JSON schema of a record, as shards hold it; with --lines of one as you write it."""
    from xvlm.data.readers import json_lines
    from xvlm.data.records import Record

    typer.echo(json.dumps(json_lines.schema() if lines else Record.model_json_schema(), indent=2))


@app.command()
def index(
    tars: Annotated[list[str], typer.Argument(help="Paths, URLs or pipe: commands; {000..099} and * for many.")],
    out: Annotated[Path, typer.Option(help="The index goes to this folder, which then counts as packed.")],
    cache: Annotated[Path, typer.Option(help="What is fetched is kept here.")] = Path("~/.cache/xvlm"),
    gigabytes: Annotated[float, typer.Option(help="How much is kept; what was not read for longest goes.")] = 50.0,
) -> None:
    """Make tars of others (webdataset's layout) readable like packed ones."""
    from xvlm.data.cache import Cache
    from xvlm.data.tars import expand, write_index

    places = expand(tars)
    index = write_index(places, out, Cache(folder=cache, gigabytes=gigabytes))
    typer.echo(f"{out}: {counted(index.counts['records'], 'record')} in {counted(len(index.shards), 'tar')}")


@app.command()
def show(
    shards: Annotated[str, typer.Argument(help="Shards, or tars (path, URL, pipe:).")],
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("records.png"),
    count: Annotated[int, typer.Option(min=1, help="How many records.")] = 12,
    kind: Annotated[list[str] | None, typer.Option(help="regions, objects, ... Default: all with boxes.")] = None,
    record: Annotated[list[str] | None, typer.Option(help="Id of a record. Default: the first ones.")] = None,
    text: Annotated[str | None, typer.Option(help="Only what has this in its text.")] = None,
    most: Annotated[int, typer.Option(min=1, help="How many of a kind are drawn in one picture.")] = 8,
) -> None:
    """A contact sheet of records: for each kind of text, its boxes drawn and what is said of them."""
    from xvlm import viz
    from xvlm.data.images import Undecodable, decode_image
    from xvlm.data.shards import BrokenSample, Shards
    from xvlm.data.stats import SAID, chosen_in

    if unknown := set(kind or []) - set(SAID):
        raise ValueError(f"--kind {', '.join(sorted(unknown))}: no such kind of text; there are {', '.join(SAID)}")
    packed = Shards(_packed(shards))
    try:
        numbers = [packed.find(name) for name in record] if record else range(len(packed))
    except KeyError as error:
        raise ValueError(f"--record {error.args[0]}: there is no such record in {shards}") from None
    pictures, captions, shown = [], [], 0
    for i in numbers:
        try:
            sample, image = packed.read(i)
            if not (chosen := chosen_in(sample, kind, text)):
                continue
            picture = decode_image(image)
        except (BrokenSample, Undecodable) as error:
            broken = error if isinstance(error, BrokenSample) else packed.broken(i, str(error))
            typer.echo(f"left out: {broken}", err=True)
            continue
        first = sample.captions[0] if sample.captions else sample.id
        for name, said in chosen.items():
            drawn, legend = viz.numbered(picture, [("; ".join(one.texts), one.boxes_xyxy) for one in said], most)
            pictures.append(drawn)
            captions.append(f"{first}\n{name}:\n{legend}")
        shown += 1
        if shown == count:
            break
    if not shown:
        raise ValueError(f"{shards}: no record that can be shown has what is asked for")
    viz.contact_sheet(pictures, captions).save(out)
    typer.echo(str(out))


def _packed(entry: str) -> Path:
    """The folder with the index of shards, which tars get in the cache."""
    from xvlm.data import tars
    from xvlm.data.cache import Cache

    return tars.locate(entry, Cache())


def _cores() -> int:
    """Processes that may run at once, as far as this one may know."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
