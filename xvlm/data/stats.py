"""How much of what a packed folder holds: records, texts, boxes and words, per source and kind."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from xvlm.data.records import Box, Record
from xvlm.data.shards import Shards
from xvlm.prose import counted

SHARES = (5, 50, 95)  # percentiles
SAID = ("captions", "regions", "objects", "phrases", "expressions", "questions", "statements")  # of a record
COMMON = 10  # words that are named
SMALL, LARGE = 32, 96  # pixels: COCO calls a box small below 32x32 and large above 96x96


@dataclass
class Stats:
    """What was counted.

    Args:
        counts: of each source, what there is how often.
        words: of each kind of text, the number of words of each.
        boxes: of each kind of box, the side of the square with its area in pixels, and its share of the image's area.
        vocabulary: of each kind of text, lower-case words, how often; phrases are parts of captions.
        broken: records that could not be read.
    """

    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    words: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    boxes: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    vocabulary: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    broken: int = 0

    def lines(self) -> list[str]:
        """As a person reads it."""
        lines = []
        for source, counts in self.counts.items():
            said = ", ".join(f"{count} {what}" for what, count in counts.items() if what != "records")
            lines.append(f"{source}: {counts['records']} records; {said}")
        for kind, words in self.words.items():
            few, half, many = np.percentile(words, SHARES)
            vocabulary = self.vocabulary[kind]
            common = ", ".join(f"{word} {count}" for word, count in vocabulary.most_common(COMMON))
            lines.append(
                f"words in {kind}: {half:.0f} ({few:.0f} to {many:.0f} in 90 of 100), at most {max(words)}; "
                f"{len(vocabulary)} different, most often {common}"
            )
        for kind, sizes in self.boxes.items():
            sides, shares = np.array(sizes).T
            small, large = (sides < SMALL).mean(), (sides > LARGE).mean()
            lines.append(
                f"boxes of {kind}: {small:.0%} small, {1 - small - large:.0%} medium, {large:.0%} large; "
                f"{np.median(shares):.1%} of the image (median)"
            )
        if self.broken:
            lines.append(f"{counted(self.broken, 'record')} that cannot be read: not counted")
        return lines

    def distributions(self) -> dict[str, Sequence[int | float]]:
        """Titles and values for histograms."""
        words = {f"words in {kind}": values for kind, values in self.words.items()}
        boxes = {f"boxes of {kind}: side / image's": [share**0.5 for _, share in v] for kind, v in self.boxes.items()}
        return words | boxes


def count(folder: Path) -> Stats:
    """Count what a packed folder holds. Images are not decoded; records that cannot be read are logged and left out.

    Raises:
        FileNotFoundError, ValueError: it is not packed.
    """
    shards, stats = Shards(folder), Stats()
    for record in shards.records():
        counts = stats.counts[record.source]
        counts["records"] += 1
        for kind, said in said_in(record).items():
            texts = [text for one in said for text in one.texts]
            boxes_xyxy = [box for one in said for box in one.boxes_xyxy]
            counts[kind] += len(said)
            words_of = kind
            if kind == "regions":
                words_of = "descriptions"
                counts[words_of] += len(texts)
            stats.words[words_of] += [len(text.split()) for text in texts]
            stats.vocabulary[words_of].update(word for text in texts for word in re.findall(r"[^\W_]+", text.lower()))
            if boxes_xyxy:
                counts[f"boxes of {kind}"] += len(boxes_xyxy)
                areas = [(right - left) * (bottom - top) for left, top, right, bottom in boxes_xyxy]
                stats.boxes[kind] += [(area**0.5, area / (record.width * record.height)) for area in areas]
    stats.broken = len(shards) - sum(counts["records"] for counts in stats.counts.values())
    return stats


class Said(NamedTuple):
    """What is said, in how many ways, and the boxes it is about."""

    texts: list[str]
    boxes_xyxy: list[Box]


def said_in(record: Record) -> dict[str, list[Said]]:
    """Everything said in a record, by kind; kinds it does not have are left out."""
    said = {
        "captions": [Said([text], []) for text in record.captions],
        "regions": [Said(region.descriptions, [region.box_xyxy]) for region in record.regions],
        "objects": [Said([thing.label], [thing.box_xyxy]) for thing in record.objects],
        "phrases": [
            Said([record.captions[phrase.caption][phrase.start : phrase.end]], phrase.boxes_xyxy)
            for phrase in record.phrases
        ],
        "expressions": [Said([one.text], [one.box_xyxy] if one.box_xyxy else []) for one in record.expressions],
        "questions": [Said([question.text], []) for question in record.questions],
        "statements": [Said([statement.text], []) for statement in record.statements],
    }
    return {kind: each for kind, each in said.items() if each}


def chosen_in(record: Record, kinds: Sequence[str] | None, text: str | None) -> dict[str, list[Said]]:
    """What of a record is to be shown, by kind.

    Args:
        kinds: of ``SAID``; none: those with boxes, or all where nothing has a box.
        text: only what has this in its text, in large or small letters.
    """
    said = said_in(record)
    if text is not None:
        found = {
            kind: [one for one in each if text.lower() in " ".join(one.texts).lower()] for kind, each in said.items()
        }
        said = {kind: each for kind, each in found.items() if each}
    elif not said:
        said["captions"] = []
    boxed = [kind for kind, each in said.items() if any(one.boxes_xyxy for one in each)]
    return {kind: said[kind] for kind in kinds or boxed or said if kind in said}
