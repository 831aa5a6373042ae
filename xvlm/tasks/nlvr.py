"""NLVR2: is a statement true of two images? And text assignment, X-VLM's pre-training for it.

Both need a model whose ``text.looks`` is 2: its cross layers look at the first and the second image in turn.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from xvlm import losses
from xvlm.config import Configured
from xvlm.data.processor import Processor
from xvlm.data.reading import read_image
from xvlm.data.reading import records as read_records
from xvlm.data.records import Record
from xvlm.data.shards import Shards
from xvlm.data.streams import Stream
from xvlm.models.xvlm import XVLM
from xvlm.types import Batch, Concepts, Movable, Texts

HEADS = ("truth_head",)
ASSIGNMENT_HEADS = ("image_projection", "assignment_head")


@dataclass(frozen=True)
class Statements(Movable):
    """Statements about two images each; ``about`` are rows of ``images``, first image first."""

    images: Float[Tensor, "image 3 height width"]
    texts: Texts
    about: Int[Tensor, "text 2"]
    true: Bool[Tensor, "text"]
    ids: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    seen: dict[str, int] = field(default_factory=dict)


class NlvrConfig(Configured):
    """How assignment draws its wrong images; the statements' own task has nothing to choose."""

    name: Literal["nlvr", "assignment"] = "nlvr"
    temperature: float = 0.07  # of the similarity between images by which they are drawn
    neither: float = 1 / 3  # share of texts that are shown two wrong images


class Task(nn.Module):
    """True or false, cross-entropy (X-VLM section 4.2; reference ``models/model_nlvr.py``).

    The model needs the heads of ``HEADS``.
    """

    def __init__(self, config: NlvrConfig, model: XVLM):
        super().__init__()
        self.config, self.model = config, model

    def forward(self, batches: dict[str, Statements]) -> dict[str, Tensor]:
        """Losses by name, ``<stream>/truth``."""
        return {
            f"{stream}/truth": losses.classification(self.judge(batch), batch.true.long())
            for stream, batch in batches.items()
        }

    @torch.inference_mode()
    def predict(self, batch: Statements) -> Float[Tensor, "text"]:
        """Probability that each statement is true of its images."""
        return self.judge(batch).float().softmax(-1)[:, 1]

    def judge(self, batch: Statements) -> Float[Tensor, "text 2"]:
        words = self.model.encode_text(batch.texts)
        concepts = self.model.encode_image(batch.images)
        return self.model.judge(self.model.fuse(words, concepts, batch.about, only=words.beginnings))


class Assignment(nn.Module):
    """Which of two images is a caption about, the first, the second or neither? (reference
    ``models/model_nlvr_pretrain.py``, after ALBEF)

    The wrong images come from the same batch, similar ones more often. The model needs the heads of
    ``ASSIGNMENT_HEADS``; ``image_projection`` only tells how similar images are and does not learn.
    """

    def __init__(self, config: NlvrConfig, model: XVLM):
        super().__init__()
        self.config, self.model = config, model
        model.image_projection.requires_grad_(False)

    def forward(self, batches: dict[str, Batch]) -> dict[str, Tensor]:
        """Losses by name, ``<stream>/assignment``.

        Raises:
            ValueError: a batch of fewer than three images.
        """
        named = {}
        for stream, batch in batches.items():
            concepts, own = self.model.encode_image(batch.images), batch.regions.image
            others = draw_others(self.model.embed_image(concepts), own, self.config.temperature)
            about, answer = arrange(own, others, torch.rand(len(own), 2), self.config.neither)
            logits = self.assign(batch.texts, concepts, about)
            named[f"{stream}/assignment"] = losses.classification(logits, answer)
        return named

    @torch.inference_mode()
    def predict(self, batch: Statements) -> Float[Tensor, "text 3"]:
        """Probabilities that each text is about its first image, its second, neither."""
        return self.assign(batch.texts, self.model.encode_image(batch.images), batch.about).float().softmax(-1)

    def assign(self, texts: Texts, concepts: Concepts, about: Int[Tensor, "text 2"]) -> Float[Tensor, "text 3"]:
        words = self.model.encode_text(texts)
        return self.model.assign(self.model.fuse(words, concepts, about, only=words.beginnings))


@torch.no_grad()
def draw_others(
    image: Float[Tensor, "image dim"], own: Int[Tensor, "text"], temperature: float
) -> Int[Tensor, "text 2"]:
    """Two different images for each text, neither its own, with the softmax of their similarity to its own.

    1e-5 is added to every weight, as hard negatives have it: the reference adds nothing and fails where all but one
    of the weights vanish.

    Raises:
        ValueError: fewer than three images.
    """
    if len(image) < 3:
        raise ValueError(f"text assignment draws two wrong images, but the batch has {len(image)} images")
    similarity = losses.similarity(image, image, torch.tensor(temperature, device=image.device))
    weights = (similarity.softmax(1) + 1e-5).fill_diagonal_(0)
    return torch.multinomial(weights[own], 2)


def arrange(
    own: Int[Tensor, "text"], others: Int[Tensor, "text 2"], chance: Float[Tensor, "text 2"], neither: float
) -> tuple[Int[Tensor, "text 2"], Int[Tensor, "text"]]:
    """The two images each text is shown, and which of them is its own: the first (0), the second (1) or neither (2).

    Args:
        chance: uniform in [0, 1): up to ``neither``, the first number puts two others there; above one half, the second
            puts the text's own image first.
    """
    hidden, first = (chance[:, 0] <= neither).to(own.device), (chance[:, 1] > 0.5).to(own.device)
    answer = torch.where(hidden, 2, torch.where(first, 0, 1))
    pairs = torch.stack([torch.stack([own, others[:, 0]], 1), torch.stack([others[:, 0], own], 1), others])
    return pairs[answer, torch.arange(len(own), device=own.device)], answer


# Training: statements with their two images.


@dataclass(frozen=True)
class Said:
    """A statement as ids, its truth, and which of its record's ``others`` the second image is."""

    ids: list[int]
    true: bool
    other: int


@dataclass(frozen=True)
class Left:
    """A record's own image, which is the left one, the other images, and what is said about it and them."""

    record: Record
    source: str
    pixels: UInt8[Tensor, "3 height width"]
    others: list[UInt8[Tensor, "3 height width"]]
    said: list[Said]


class Pairs(Stream):
    """Records to statements, at most ``max_regions`` of each; every image is augmented once, in its own way."""

    def sample(self, place: int, source: str, shards: Shards, i: int, rng: Random) -> Left:
        record, image = read_image(shards, i)
        known = [statement for statement in record.statements if self.processor.has_words(statement.text)]
        if not known:
            raise shards.broken(i, "the record has no statement")
        drawn = rng.sample(known, min(self.config.max_regions, len(known)))
        names = list(dict.fromkeys(statement.other for statement in drawn))
        others = [self._look(shards, number_of(shards, i, record, name), rng) for name in names]
        said = [Said(self.processor.encode(s.text)[0], s.label, names.index(s.other)) for s in drawn]
        left = self.augmented(shards, i, image, rng).pixels
        return Left(record, source or record.source, left, others, said)

    def _look(self, shards: Shards, i: int, rng: Random) -> UInt8[Tensor, "3 height width"]:
        return self.augmented(shards, i, read_image(shards, i)[1], rng).pixels

    def batch(self, texts: Sequence[tuple[Left, Said]], skipped: tuple[str, ...]) -> Statements:
        lefts = list({id(left): left for left, _ in texts}.values())
        pixels, row = [left.pixels for left in lefts], {}
        for number, left in enumerate(lefts):
            row[id(left)] = (number, len(pixels))
            pixels += left.others
        about = [(row[id(left)][0], row[id(left)][1] + said.other) for left, said in texts]
        return Statements(
            images=self.processor.normalise(pixels),
            texts=self.processor.pad([said.ids for _, said in texts]),
            about=torch.tensor(about),
            true=torch.tensor([said.true for _, said in texts]),
            ids=tuple(left.record.id for left in lefts),
            skipped=skipped,
            seen=dict(Counter(f"{left.source}/statements" for left, _ in texts)),
        )


def number_of(shards: Shards, i: int, record: Record, other: str) -> int:
    """The sample that a statement of record ``i`` names.

    Raises:
        BrokenSample: it is not in the same folder.
    """
    try:
        return shards.find(other)
    except KeyError:
        reason = f"the other image of a statement, {other!r}, is not in {shards.folder}"
        raise shards.broken(i, reason) from None


# Evaluation.


@dataclass(frozen=True)
class Judged:
    """A statement about two images, whether it is true, and the probability that it is."""

    record: str
    other: str
    text: str
    label: bool
    probability: float

    @property
    def right(self) -> bool:
        return (self.probability > 0.5) == self.label


@torch.inference_mode()
def ask(
    task: Task,
    processor: Processor,
    shards: Shards,
    places: Sequence[int],
    records: Sequence[Record],
    images: Float[Tensor, "image 3 height width"],
) -> list[list[Judged]]:
    """Every statement of some records, judged; ``places`` are the records' numbers in ``shards``."""
    judged: list[list[Judged]] = [[] for _ in records]
    asked = [(n, said) for n, record in enumerate(records) for said in record.statements]
    asked = [(n, said) for n, said in asked if processor.has_words(said.text)]
    others = sorted({number_of(shards, places[n], records[n], said.other) for n, said in asked})
    row, shown = {}, [images]
    for some, part in read_records(shards, processor, others, max(1, len(others))):
        row |= {record.id: len(images) + n for n, record in enumerate(some)}
        shown.append(part)
    asked = [(n, said) for n, said in asked if said.other in row]  # what cannot be read has been logged
    if asked:
        batch = Statements(
            images=torch.cat(shown),
            texts=processor.texts([said.text for _, said in asked]),
            about=torch.tensor([(n, row[said.other]) for n, said in asked]),
            true=torch.tensor([said.label for _, said in asked]),
        )
        probabilities = task.predict(batch.to(next(task.parameters()).device)).tolist()
        for (n, said), p in zip(asked, probabilities, strict=True):
            judged[n].append(Judged(records[n].id, said.other, said.text, said.label, p))
    return judged


def numbers(rows: Sequence[Judged]) -> dict[str, float]:
    """Accuracy, and consistency: the share of texts that are judged right of every pair they are said about.

    Raises:
        ValueError: no statement.
    """
    if not rows:
        raise ValueError("nothing to score: the records have no statements")
    texts: dict[str, bool] = {}
    for row in rows:
        texts[row.text] = texts.get(row.text, True) and row.right
    return {"accuracy": sum(row.right for row in rows) / len(rows), "consistency": sum(texts.values()) / len(texts)}


def commonest(rows: Sequence[Judged]) -> list[Judged]:
    """The same statements, all judged as most of them are: what a model is compared with."""
    share = sum(row.label for row in rows) / len(rows)
    return [replace(row, probability=share) for row in rows]
