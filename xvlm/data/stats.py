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

SHARES = (5, 50, 95)  # percentiles
SMALL, LARGE = 32, 96  # pixels: COCO calls a box small below 32x32 and large above 96x96


@dataclass
class Stats:
    """What was counted.

    Args:
        counts: of each source, what there is how often.
        words: of each kind of text, the number of words of each.
        boxes: of each kind of box, the side of the square with its area in pixels, and its share of the image's area.
        vocabulary: lower-case words, how often.
    """

    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    words: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    boxes: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    vocabulary: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """As a person reads it."""
        lines = []
        for source, counts in self.counts.items():
            said = ", ".join(f"{count} {what}" for what, count in counts.items() if what != "records")
            lines.append(f"{source}: {counts['records']} records; {said}")
        for kind, words in self.words.items():
            few, half, many = np.percentile(words, SHARES)
            lines.append(f"words in {kind}: {half:.0f} ({few:.0f} to {many:.0f} in 90 of 100), at most {max(words)}")
        for kind, sizes in self.boxes.items():
            sides, shares = np.array(sizes).T
            small, large = (sides < SMALL).mean(), (sides > LARGE).mean()
            lines.append(
                f"boxes of {kind}: {small:.0%} small, {1 - small - large:.0%} medium, {large:.0%} large; "
                f"{np.median(shares):.1%} of the image (median)"
            )
        common = ", ".join(f"{word} {count}" for word, count in self.vocabulary.most_common(10))
        lines.append(f"{len(self.vocabulary)} different words, most often {common}")
        return lines

    def distributions(self) -> dict[str, Sequence[int | float]]:
        """Titles and values for histograms."""
        words = {f"words in {kind}": values for kind, values in self.words.items()}
        boxes = {f"boxes of {kind}: side / image's": [share**0.5 for _, share in v] for kind, v in self.boxes.items()}
        return words | boxes


def count(folder: Path) -> Stats:
    """Count what a packed folder holds. Images are not decoded.

    Raises:
        FileNotFoundError, ValueError: it is not packed.
        BrokenSample: a record that cannot be read.
    """
    shards, stats = Shards(folder), Stats()
    for i in range(len(shards)):
        record, _ = shards.read(i)
        counts = stats.counts[record.source]
        counts["records"] += 1
        for kind, said in said_in(record).items():
            texts = [text for one in said for text in one.texts]
            boxes_xyxy = [box for one in said for box in one.boxes_xyxy]
            counts[kind] += len(texts)
            stats.words[kind] += [len(text.split()) for text in texts]
            stats.vocabulary.update(word for text in texts for word in re.findall(r"[^\W_]+", text.lower()))
            if boxes_xyxy:
                counts[f"boxes of {kind}"] += len(boxes_xyxy)
                areas = [(right - left) * (bottom - top) for left, top, right, bottom in boxes_xyxy]
                stats.boxes[kind] += [(area**0.5, area / (record.width * record.height)) for area in areas]
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
