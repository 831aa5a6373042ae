"""Visual question answering: rank the answers of a list by what a decoder would write, or let it write."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from random import Random
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from xvlm import losses
from xvlm.config import Configured
from xvlm.data.processor import Processor
from xvlm.data.reading import read_image
from xvlm.data.records import Record
from xvlm.data.shards import Shards
from xvlm.data.streams import Said, Sample, Stream
from xvlm.metrics import vqa as official
from xvlm.models.decoder import Answerer, Writing, next_words
from xvlm.models.generation import GenerationConfig, Written, generate
from xvlm.models.xvlm import XVLM
from xvlm.types import Batch, Movable, Regions, Texts

HEADS = ("word_head",)  # of the pre-trained model that an answerer starts from


class VqaConfig(Configured):
    name: Literal["vqa"] = "vqa"
    decoder_layers: Annotated[int, Field(ge=1)] = 6  # at most the cross encoder's, whose weights they start with
    ask: Literal["rank", "write"] = "rank"  # how answers are got: from a list, or in the decoder's own words
    answers: Path | None = None  # the list, a JSON array; null: the commonest answers of the training questions
    commonest: Annotated[int, Field(ge=1)] = 3128  # how many of these; as many as the reference's list has
    candidates: Annotated[int, Field(ge=1)] = 128  # answers of the list that are scored word by word
    # The reference adds the first word's log-probability to a sum that already contains it; its published accuracies
    # are measured so.
    first_word_twice: bool = True
    generation: GenerationConfig = GenerationConfig(max_tokens=10, min_tokens=2)  # not in the reference


@dataclass(frozen=True, kw_only=True)
class AnsweredBatch(Batch):
    """``texts`` are questions, ``[CLS] …`` without [SEP]; answers are ``[CLS] … [SEP]``, any number per question."""

    answers: Texts
    question: Int[Tensor, "answer"]  # which question each answers
    weights: Float[Tensor, "answer"]  # how much each counts, as the share of people who gave it


@dataclass(frozen=True)
class Ranking(Movable):
    """The best answers of a list for each question, best first, by number; probabilities sum to 1 over those scored."""

    answers: Int[Tensor, "question candidate"]
    probabilities: Float[Tensor, "question candidate"]


class Task(nn.Module):
    """Writing answers (X-VLM, reference ``models/model_vqa.py``); a question may be about a region too."""

    def __init__(self, config: VqaConfig, model: Answerer):
        super().__init__()
        self.config = config
        self.model = model
        self.answers: list[str] | None = None  # to choose from, once they were looked up: see answer_list

    def forward(self, batches: dict[str, AnsweredBatch]) -> dict[str, Tensor]:
        """Losses by name, ``<stream>/answer``."""
        return {f"{stream}/answer": self.loss(batch) for stream, batch in batches.items()}

    def loss(self, batch: AnsweredBatch) -> Tensor:
        """Weighted loss of the answers' words, summed per question; mean over questions."""
        _, questions = self.model.read(batch.images, batch.texts, batch.regions)
        only, words = next_words(batch.answers)
        logits = self.model.decoder(batch.answers, questions, batch.question, only=only)
        weights = batch.weights[only.nonzero()[:, 0]]
        return losses.answers(logits, words, weights, len(batch.texts.ids))

    @torch.no_grad()
    def predict(self, batch: Batch, answers: Texts) -> Ranking:
        """Rank a list of answers for each question of a batch (reference ``rank_answer``).

        The answers whose first word is likeliest are scored by the log-probability of all their words.

        Args:
            answers: ``[CLS] … [SEP]``, the same list for every question.
        """
        _, questions = self.model.read(batch.images, batch.texts, batch.regions)
        count, kept = len(batch.texts.ids), min(self.config.candidates, len(answers.ids))
        about = torch.arange(count, device=answers.ids.device)
        start = Texts(answers.ids[:1, :1], answers.mask[:1, :1])
        first = self.model.decoder(start, questions, about, of=torch.zeros_like(about)).float().log_softmax(-1)
        first, chosen = first[:, answers.ids[:, 1]].sort(dim=1, descending=True, stable=True)
        first, chosen = first[:, :kept], chosen[:, :kept]

        of = chosen.flatten()
        only, words = next_words(Texts(answers.ids[of], answers.mask[of]))
        logits = self.model.decoder(answers, questions, about.repeat_interleave(kept), of, only)
        scores = torch.zeros(len(of), device=of.device)
        scores = scores.index_add(0, only.nonzero()[:, 0], -losses.next_words(logits, words)).view(count, kept)
        if self.config.first_word_twice:
            scores = scores + first
        best = scores.softmax(1).sort(dim=1, descending=True, stable=True)
        return Ranking(chosen.gather(1, best.indices), best.values)

    @torch.no_grad()
    def write(self, batch: Batch, end: int) -> Written:
        """Answers in the decoder's own words, where there is no list; each begins with [CLS].

        Args:
            end: id of the token that ends an answer.
        """
        _, questions = self.model.read(batch.images, batch.texts, batch.regions)
        about = torch.arange(len(batch.texts.ids), device=batch.images.device)
        rows = about.repeat_interleave(self.config.generation.beams)
        start = batch.texts.ids[:, :1]
        return generate(Writing(self.model.decoder, questions, rows), start, end, self.config.generation)


# Training: questions with their answers.


@dataclass(frozen=True)
class Asked(Said):
    """A question with its answers, ids and weight each."""

    answers: list[tuple[list[int], float]]


class Questions(Stream):
    """Records to questions about whole images; at most ``max_regions`` of each image.

    Where the image is flipped, left and right are looked for in questions and answers.
    """

    def sample(self, place: int, source: str, shards: Shards, i: int, rng: Random) -> Sample:
        record, image = read_image(shards, i)
        known = [question for question in record.questions if question.answers]
        chosen = rng.sample(known, min(self.config.max_regions, len(known)))
        texts = [question.text for question in chosen] + [answer for each in chosen for answer in each.answers]
        seen = self.augmented(shards, i, image, rng, texts)
        height, width = self.processor.config.image_size
        answers, said = iter(seen.texts[len(chosen) :]), []
        for question, text in zip(chosen, seen.texts, strict=False):
            given = [(next(answers), weight) for weight in question.answers.values()]
            given = [(ending(self.processor, answer), w) for answer, w in given if self.processor.has_words(answer)]
            if given and self.processor.has_words(text):
                ids = self.processor.encode(text)[0]
                whole = [0.0, 0.0, float(width), float(height)]
                said.append(Asked(ids, ids, [False] * len(ids), "question", whole, given))
        if not said:
            raise shards.broken(i, "the record has no question with an answer")
        return Sample(place, record, source or record.source, seen.pixels, said)

    def batch(self, texts: Sequence[tuple[Sample, Asked]], skipped: tuple[str, ...]) -> AnsweredBatch:
        batch = super().batch(texts, skipped)
        answers = [(q, ids, weight) for q, (_, asked) in enumerate(texts) for ids, weight in asked.answers]
        return AnsweredBatch(
            **{field.name: getattr(batch, field.name) for field in fields(batch)},
            answers=self.processor.pad([ids for _, ids, _ in answers]),
            question=torch.tensor([q for q, _, _ in answers]),
            weights=torch.tensor([weight for _, _, weight in answers]),
        )


def ending(processor: Processor, text: str) -> list[int]:
    """Ids of a text as a decoder writes it, [CLS] first and [SEP] last."""
    end = [] if processor.config.end_token else [processor.tokenizer.sep_token_id]
    return [*processor.encode(text)[0], *end]


def starting_model(config: VqaConfig, model: XVLM) -> tuple[Answerer, list[str]]:
    """An answerer from a pre-trained model, and the names of its parameters that start fresh."""
    made = Answerer.of(model, config.decoder_layers)
    same_width = model.vision.dim == model.config.text.dim

    def is_fresh(name: str) -> bool:
        part = re.fullmatch(r"decoder\.cross\.layers\.(\d+)\.(.+)", name)
        looks = part is not None and part[2].startswith(("cross_attention.key.", "cross_attention.value."))
        return part is not None and (int(part[1]) >= len(model.cross.layers) or (looks and not same_width))

    return made, [name for name, _ in made.named_parameters() if is_fresh(name)]


# Evaluation.


@dataclass(frozen=True)
class Answered:
    """A question with the answers that were given, by the share of people, and the one that was found."""

    record: str
    question: str
    id: str
    kind: str
    given: dict[str, float]
    answer: str

    @property
    def accuracy(self) -> float:
        """By the official rule, with shares as ten annotators."""
        return official.accuracy(
            self.answer, [text for text, share in self.given.items() for _ in range(round(10 * share))]
        )


def answer_list(config: VqaConfig, folders: Iterable[Path]) -> list[str]:
    """The answers to choose from: those of ``config.answers``, or the commonest of the training questions.

    Raises:
        ValueError: the file is no list of texts, or there are no answers.
    """
    if config.answers is not None:
        known = json.loads(config.answers.read_text(encoding="utf-8"))
        if not isinstance(known, list) or not all(isinstance(each, str) for each in known):
            raise ValueError(f"{config.answers}: expected a JSON array of texts")
        return known
    total: Counter[str] = Counter()
    for shards in map(Shards, folders):
        for record in shards.records():
            for question in record.questions:
                total.update(question.answers)
    if not total:
        raise ValueError("task.answers: the training records have no answers to choose from")
    return [answer for answer, _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))][: config.commonest]


@torch.inference_mode()
def ask(
    task: Task,
    processor: Processor,
    answers: Sequence[str],
    records: Sequence[Record],
    images: Float[Tensor, "image 3 height width"],
) -> list[list[Answered]]:
    """Every question of some records, answered; ``answers`` are not looked at where ``task.config.ask`` is write."""
    asked = [(i, q) for i, record in enumerate(records) for q in record.questions if processor.has_words(q.text)]
    answered: list[list[Answered]] = [[] for _ in records]
    if not asked:
        return answered
    device = next(task.parameters()).device
    regions = Regions.whole_images(torch.tensor([i for i, _ in asked]), processor.config.image_size)
    batch = Batch(images, processor.texts([question.text for _, question in asked]), regions).to(device)
    if task.config.ask == "rank":
        ranking = task.predict(batch, processor.pad([ending(processor, answer) for answer in answers]).to(device))
        found = [answers[best] for best in ranking.answers[:, 0].tolist()]
    else:
        written = task.write(batch, processor.tokenizer.sep_token_id).texts
        found = processor.tokenizer.batch_decode(written.ids.cpu(), skip_special_tokens=True)
    for (i, question), answer in zip(asked, found, strict=True):
        about = (records[i].id, question.text, question.id, question.kind, question.answers)
        answered[i].append(Answered(*about, answer))
    return answered


def numbers(rows: Sequence[Answered]) -> dict[str, float]:
    """VQA accuracy, over all questions whose answers are known and by their kind; nothing where none are known."""
    known = [row for row in rows if row.given]
    if not known:
        return {}
    kinds = sorted({row.kind for row in known if row.kind})
    groups = {"accuracy": known} | {f"accuracy {kind}": [row for row in known if row.kind == kind] for kind in kinds}
    return {name: sum(row.accuracy for row in group) / len(group) for name, group in groups.items()}


def commonest(rows: Sequence[Answered]) -> list[Answered]:
    """The same questions, each answered with the commonest answer to its kind: what a model is compared with."""
    total: dict[str, Counter[str]] = {}
    for row in rows:
        total.setdefault(row.kind, Counter()).update(row.given)
    best = {kind: answers.most_common(1)[0][0] if answers else "" for kind, answers in total.items()}
    return [replace(row, answer=best[row.kind]) for row in rows]


def submission(rows: Sequence[Answered]) -> list[dict[str, str | int]]:
    """What the VQA server takes: question ids and answers.

    Raises:
        ValueError: a question without an id, by name.
    """
    if nameless := next((row for row in rows if not row.id), None):
        raise ValueError(
            f"record {nameless.record}: the question {nameless.question!r} has no id to be submitted under"
        )
    return [{"question_id": int(row.id) if row.id.isdigit() else row.id, "answer": row.answer} for row in rows]
