"""Visual question answering: rank the answers of a list by what a decoder would write, or let it write."""

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from xvlm import losses
from xvlm.config import Configured
from xvlm.models.decoder import Answerer, Writing, next_words
from xvlm.models.generation import GenerationConfig, Written, generate
from xvlm.types import Batch, Movable, Texts


class VqaConfig(Configured):
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
