"""The card of a folder of weights, its ``README.md``: what is known of them, and that the rest is not.

The block at its top is what the hub reads: https://huggingface.co/docs/hub/model-cards. A card that somebody wrote or
edited is never replaced.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from xvlm import hub

if TYPE_CHECKING:
    from xvlm.models.xvlm import Pretrained

# Of the names that the hub has for licences, the usual ones; any other words are "other" to it.
LICENCES = {"mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "openrail", "cc0-1.0"}
LICENCES |= {"cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Card:
    """What is known about some weights, in Markdown; what is left out is not known, and the card says so."""

    name: str = ""  # the folder's, if left out
    about: str = ""  # more sentences for the first paragraph
    origin: str = ""  # how they were made
    data: str = ""  # on what they were trained
    datasets: tuple[str, ...] = ()  # the same as names, for the hub
    languages: tuple[str, ...] = ()  # of the texts: en, ...
    licence: str = ""  # a name (BSD-3-Clause), or words
    numbers: str = ""  # what they were measured to do


def write_card(model: "Pretrained", folder: Path, card: Card) -> None:
    """Write the card of a model into its folder, unless there is one that was written or edited by hand."""
    file = folder / hub.CARD
    if file.exists() and not hub.is_signed(file.read_text(encoding="utf-8")):
        logger.warning("%s: kept, because it was written or edited by hand; remove it for a new one", file)
        return
    hub.write_atomically(file, hub.signed(text(model, card, card.name or folder.name)))


def text(model: "Pretrained", card: Card, name: str) -> str:
    """The card of a model that is loaded by this name."""
    kind = type(model)
    height, width = model.config.vision.image_size
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters, images of {height} x {width} pixels."
    return _CARD.format(
        header=yaml.safe_dump(_header(card), sort_keys=False).strip(),
        name=name,
        about=" ".join(filter(None, [size, card.about])),
        imports="XVLM, Processor" if kind.__name__ == "XVLM" else "Processor",
        also="" if kind.__name__ == "XVLM" else f"    from {kind.__module__} import {kind.__name__}\n",
        kind=kind.__name__,
        origin=card.origin or "Not stated.",
        data=card.data or "Not stated.",
        licence=card.licence or "Not stated. Those of the data and of weights it started from may have a say.",
        numbers=card.numbers or "None were handed over when these weights were saved.",
    )


def table(columns: list[str], rows: list[list[object]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _header(card: Card) -> Mapping[str, object]:
    licence = card.licence.lower()
    known: dict[str, object] = {"library_name": "xvlm"}
    known["license"] = licence if licence in LICENCES else "other" if licence else "unknown"
    known["tags"] = ["x-vlm", "vision-language"]
    if card.languages:
        known["language"] = list(card.languages)
    if card.datasets:
        known["datasets"] = list(card.datasets)
    return known


_CARD = """---
{header}
---

# {name}

{about} A multi-grained vision-language model (X-VLM, arXiv 2111.08276) for the xvlm library:

    from xvlm import {imports}
{also}    model, processor = {kind}.from_pretrained("{name}"), Processor.from_pretrained("{name}")

## Data

{data}

## Numbers

{numbers}

`golden.safetensors` holds what the weights answered to a fixed input when they were saved: `xvlm verify` compares.

## Licence

{licence}

## How it was made

{origin}
"""
