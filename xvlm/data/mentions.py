"""What is said about an image and its parts, and which of it is taken."""

from collections.abc import Sequence
from random import Random
from typing import Literal

import torch

from xvlm.boxes import merge
from xvlm.data.records import Box, Object, Record
from xvlm.data.stream_config import Kind, StreamConfig


def mentions(
    record: Record, kinds: Sequence[Kind], attributes: Literal["one", "all", "some"], rng: Random
) -> list[tuple[Kind, str, Box]]:
    """What kind of text about a part of an image, the text, and its box (``xyxy``)."""
    found: list[tuple[Kind, str, Box]] = []
    if "region" in kinds:
        found += [("region", rng.choice(region.descriptions), region.box_xyxy) for region in record.regions]
    if "object" in kinds:
        found += [("object", object_text(thing, attributes, rng), thing.box_xyxy) for thing in record.objects]
    if "phrase" in kinds:
        for phrase in record.phrases:
            if phrase.boxes_xyxy:
                text = record.captions[phrase.caption][phrase.start : phrase.end]
                around = merge(torch.tensor(phrase.boxes_xyxy, dtype=torch.float64)).tolist()
                found.append(("phrase", text, tuple(around)))
    if "expression" in kinds:
        found += [("expression", said.text, said.box_xyxy) for said in record.expressions if said.box_xyxy is not None]
    return found


def captions_of(record: Record, config: StreamConfig, rng: Random) -> list[str]:
    """Those of a record's captions that its image is shown with; at least one must be there."""
    if config.captions == "first":
        return record.captions[: config.max_captions]
    if config.max_captions == 1:  # as the reference draws it
        return [rng.choice(record.captions)]
    return rng.sample(record.captions, min(config.max_captions, len(record.captions)))


def object_text(thing: Object, attributes: Literal["one", "all", "some"], rng: Random) -> str:
    """A label after adjectives: one at random, all, or each with probability 1/2."""
    chosen = thing.attributes
    if attributes == "one" and chosen:
        chosen = [rng.choice(chosen)]
    elif attributes == "some":
        chosen = [attribute for attribute in chosen if rng.random() < 0.5]
    return " ".join([*chosen, thing.label])
