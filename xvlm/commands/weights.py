"""Folders of weights: export, convert, verify, push."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from xvlm import hub
from xvlm.config import validate

app = typer.Typer()


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
        check_together(processor, converted.config)
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
        check_together(Processor.from_pretrained(place), model.config)
    differences, near = golden.differences(model, place)
    for name, difference in differences.items():
        typer.echo(f"{name}: {difference:.1e}")
    verdict = "loads right" if near else f"DOES NOT LOAD RIGHT (within {golden.TOLERANCE:.0e} it would)"
    typer.echo(f"{folder}: largest difference {max(differences.values()):.1e}, {verdict}")
    return near


def check_together(processor, config) -> None:
    """Whether a processor makes what the model with this configuration takes."""
    tokenizer, embedding = processor.vocab_size, config.text.vocab_size
    if tokenizer != embedding:
        raise ValueError(
            f"the tokenizer has {tokenizer} words, the model's embedding {embedding}: they do not belong together"
        )
    made, taken = processor.config.image_size, config.vision.image_size
    if made != taken:
        raise ValueError("the processor makes images of {} x {} pixels, the model takes {} x {}".format(*made, *taken))
