"""Where things are in a picture: ground, calibrate, layers."""

from pathlib import Path
from typing import Annotated

import typer

from xvlm import hub
from xvlm.commands import DEFAULT
from xvlm.commands.weights import check_together
from xvlm.config import validate
from xvlm.prose import counted

app = typer.Typer()


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
    from xvlm.data.images import READABLE
    from xvlm.data.processor import Processor
    from xvlm.grounder import Grounder
    from xvlm.models.xvlm import XVLM
    from xvlm.presence import Presence, WithPresence
    from xvlm.tasks import grounding, pretraining
    from xvlm.zeroshot.gradcam import BestLayer, GradCAM, GradCAMConfig, word_maps

    if layer is not None and method != "gradcam" and not words:
        raise ValueError("--layer is for --method gradcam and --words")
    picture = Image.open(image, formats=READABLE).convert("RGB")
    folder = hub.locate(model)
    weights, processor = XVLM.from_pretrained(folder), Processor.from_pretrained(folder)
    check_together(processor, weights.config)
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
    typer.echo(f"{model / found.FILE}: threshold {found.threshold:.3f}, on {counted(len(held_out[1]), 'phrase')}")


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
    title = f"{counted(len(answers), 'phrase')} of {shards}, proposals: {proposals}"
    typer.echo(probe.as_text(report.Table(title, ["layer", *measures], rows)))
    if store:
        BestLayer(layer=best).save_pretrained(folder)
        typer.echo(f"{folder / BestLayer.FILE}: layer {best}")
