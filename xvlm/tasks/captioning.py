"""Captioning: write what is in an image, or in a region of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from xvlm import distributed, losses
from xvlm.config import Configured
from xvlm.data.processor import Processor
from xvlm.data.records import Record
from xvlm.data.shards import Shards
from xvlm.data.stream_config import StreamConfig
from xvlm.data.streams import Said, Stream
from xvlm.metrics import captions as metrics
from xvlm.models.decoder import Captioner, Writing, next_words
from xvlm.models.generation import GenerationConfig, Written, draw, generate
from xvlm.types import Batch, Concepts, Regions, Texts

HEADS = ("word_head",)  # of the pre-trained model that a captioner starts from


class SelfCriticalConfig(Configured):
    """Learning from the score of what is written (Rennie et al. 2017, arXiv 1612.00563); the defaults are X-VLM's."""

    samples: Annotated[int, Field(ge=1)] = 5  # captions that are drawn for each image
    # What a drawn caption has to be better than: the most likely one, or the image's other drawn ones on average.
    baseline: Literal["greedy", "samples"] = "greedy"
    max_tokens: int = 20  # of what is drawn, prompt included

    @model_validator(mode="after")
    def others_are_there(self) -> "SelfCriticalConfig":
        if self.baseline == "samples" and self.samples == 1:
            raise ValueError("baseline 'samples' compares the samples of an image; there is 1")
        return self


class CaptioningConfig(Configured):
    """The defaults are X-VLM's fine-tuning; its pre-training of the decoder has no prompt and no smoothing."""

    name: Literal["captioning"] = "captioning"
    prompt: str = "a picture of"  # every caption begins so; what is written is what follows
    prompt_tokens: Annotated[int, Field(ge=1)] = 4  # of the prompt, [CLS] included: these are given and not learned
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    generation: GenerationConfig = GenerationConfig()
    self_critical: SelfCriticalConfig | None = None  # instead of the next words' loss
    java: bool = False  # METEOR and SPICE as well, which run Java


class Task(nn.Module):
    """Next words of captions (X-VLM, reference ``models/model_captioning.py``); texts are ``[CLS] prompt … [SEP]``."""

    reward: "Reward | None" = None  # what self-critical training needs, see :func:`prepare`

    def __init__(self, config: CaptioningConfig, model: Captioner):
        super().__init__()
        self.config = config
        self.model = model

    def forward(self, batches: dict[str, Batch]) -> dict[str, Tensor]:
        """Losses by name, ``<stream>/caption``; of self-critical training, ``<stream>/self_critical``.

        That also has ``<stream>/reward``, the mean CIDEr-D of what was drawn: without a gradient, there to be logged.
        """
        if self.config.self_critical is None:
            return {f"{stream}/caption": self.loss(batch) for stream, batch in batches.items()}
        told = {}
        for stream, batch in batches.items():
            told[f"{stream}/self_critical"], told[f"{stream}/reward"] = self.self_critical_loss(batch)
        return told

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of the words after the prompt, each text about the image or region it belongs to."""
        only, words = next_words(batch.texts, self.config.prompt_tokens)
        logits = self.model.decoder(batch.texts, *self.look(batch), only=only)
        return losses.captions(logits, words, self.config.label_smoothing)

    def self_critical_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """- mean of (reward - baseline) * log-probability, over the captions drawn on all processes.

        Second, the mean reward on this one.

        The reward is CIDEr-D against the batch's own texts, several of each image; the log-probability a mean over the
        drawn words, the end among them. What is drawn for an image follows from its place in the run, so that a batch
        has the same gradient however it is spread over processes.
        """
        config, reward, count = self.config.self_critical, self.reward, len(batch.images)
        if reward is None:
            raise RuntimeError("self-critical training needs rewards: call captioning.prepare first")
        rows = torch.arange(count, device=batch.images.device).repeat_interleave(config.samples)
        prompt = batch.texts.ids[:1, : self.config.prompt_tokens]
        writing = Writing(self.model.decoder, self.model.vision(batch.images), rows)
        uniform = _uniform(batch.places, config.samples, config.max_tokens - prompt.shape[1]).to(rows.device)
        drawn = draw(writing, prompt.repeat(len(rows), 1), reward.end, config.max_tokens, uniform)
        known = [[] for _ in range(count)]
        for image, words in zip(batch.regions.image.tolist(), reward.each(batch.texts), strict=True):
            known[image].append(words)
        found = reward(drawn.texts, [known[row] for row in rows.tolist()]).view(count, config.samples)
        if config.baseline == "greedy":
            baseline = reward(self._most_likely(batch, prompt), known)[:, None]
        else:
            baseline = (found.sum(1, keepdim=True) - found) / (config.samples - 1)
        words = drawn.texts.mask[:, prompt.shape[1] :].sum(1)
        gain = (found - baseline).flatten().to(drawn.log_p.device)
        share = distributed.share_of_mean(torch.tensor(float(len(rows)), device=rows.device))
        return -(gain * drawn.log_p.sum(1) / words).sum() * share, found.mean().to(gain.device)

    @torch.no_grad()
    def _most_likely(self, batch: Batch, prompt: Int[Tensor, "1 word"]) -> Texts:
        """What the model would write of each image, without dropout."""
        was_training = self.training
        self.eval()
        images = torch.arange(len(batch.images), device=batch.images.device)
        writing = Writing(self.model.decoder, self.model.vision(batch.images), images)
        greedy = GenerationConfig(beams=1, max_tokens=self.config.self_critical.max_tokens, min_tokens=0)
        written = generate(writing, prompt.repeat(len(images), 1), self.reward.end, greedy)
        self.train(was_training)
        return written.texts

    def look(self, batch: Batch) -> tuple[Concepts, Int[Tensor, "region"]]:
        """The concepts of a batch, and which of them each of its regions is."""
        concepts = self.model.vision(batch.images, batch.regions)
        regions = torch.arange(len(batch.regions.image), device=concepts.pooled.device)
        return concepts, len(batch.images) + regions

    @torch.no_grad()
    def predict(self, batch: Batch, prompt: Int[Tensor, "word"], end: int) -> Written:
        """A caption of each region of a batch (whose texts are not read).

        Args:
            prompt: ids that every caption begins with, [CLS] first.
            end: id of the token that ends a caption.

        Raises:
            ValueError: the prompt leaves no room for a caption.
        """
        concepts, about = self.look(batch)
        rows = about.repeat_interleave(self.config.generation.beams)
        prompts = prompt.repeat(len(about), 1)
        return generate(Writing(self.model.decoder, concepts, rows), prompts, end, self.config.generation)


def _uniform(places: Int[Tensor, "image"], samples: int, words: int) -> Float[Tensor, "text word"]:
    """Numbers between 0 and 1 for the texts drawn for images, those of an image from its place in the run."""

    def of_an_image(place: int) -> Tensor:
        generator = torch.Generator().manual_seed(Random(f"draw {place}").getrandbits(63))
        return torch.rand(samples, words, generator=generator)

    return torch.cat([of_an_image(place) for place in places.tolist()])


# Training: captions after the prompt.


class Reward:
    """CIDEr-D of texts as ids; how rare a run of words is, is counted in the training captions.

    The end is a word like any other, which a text that was cut off lacks: else one could stop anywhere.
    """

    def __init__(self, processor: Processor, prompt: str, captions: Iterable[Sequence[str]]):
        self.tokenizer, self.end = processor.tokenizer, processor.tokenizer.sep_token_id
        self.given = len(start_of(processor, prompt))
        read = (
            [self.words(processor.encode(f"{prompt} {text}")[0]) for text in several if processor.has_words(text)]
            for several in captions
        )
        self.documents = metrics.Documents.of(several for several in read if several)

    def words(self, ids: Sequence[int]) -> list[str]:
        """The words of a text without padding, after its prompt."""
        text = self.tokenizer.decode(ids[self.given :], skip_special_tokens=True)
        return metrics.words(text) + [self.tokenizer.sep_token] * (ids[-1] == self.end)

    def __call__(self, written: Texts, known: Sequence[Sequence[list[str]]]) -> Float[Tensor, "text"]:
        return torch.tensor(metrics.cider_d(self.each(written), known, documents=self.documents))

    def each(self, texts: Texts) -> list[list[str]]:
        """The words of each text."""
        return [self.words(ids[mask].tolist()) for ids, mask in zip(texts.ids, texts.mask, strict=True)]


def prepare(task: Task, processor: Processor, folders: Iterable[Path]) -> None:
    """Before training: self-critical training gets its rewards, out of the records it learns from.

    Raises:
        ModuleNotFoundError, FileNotFoundError: ``java`` is asked for and cannot be had; known before, not after.
    """
    if task.config.java:
        metrics.need_java()
    if task.config.self_critical is not None:
        captions = (record.captions for shards in map(Shards, folders) for record in shards.records())
        task.reward = Reward(processor, task.config.prompt, captions)


class Captions(Stream):
    """Records to captions of whole images, each after the prompt. The processor ends texts with [SEP].

    Raises:
        ValueError: the prompt has another number of tokens than the task takes for given.
    """

    def __init__(self, task: CaptioningConfig, config: StreamConfig, processor: Processor, **place: int):
        super().__init__(config, processor, None, **place)
        self.prompt = task.prompt
        given = len(start_of(processor, task.prompt))
        if given != task.prompt_tokens:
            raise ValueError(
                f"task.prompt_tokens is {task.prompt_tokens}, but [CLS] {task.prompt!r} has {given} tokens"
            )

    def _said(self, wanted: Sequence[tuple[str, str, list[float]]], rng: Random) -> list[Said]:
        told = [each for each in wanted if self.processor.has_words(each[1])]
        return super()._said([(kind, f"{self.prompt} {text}", box) for kind, text, box in told], rng)


def start_of(processor: Processor, prompt: str) -> list[int]:
    """Ids that every caption begins with, [CLS] first."""
    if not prompt:
        return [processor.tokenizer.cls_token_id]
    ids = processor.encode(prompt)[0]
    return ids[:-1] if processor.config.end_token else ids


# Evaluation.


@dataclass(frozen=True)
class Captioned:
    """An image with the captions that people wrote and the one that was written."""

    record: str
    references: tuple[str, ...]
    caption: str


@torch.inference_mode()
def ask(
    task: Task, processor: Processor, records: Sequence[Record], images: Float[Tensor, "image 3 height width"]
) -> list[list[Captioned]]:
    """A caption for each image."""
    start, end = start_of(processor, task.config.prompt), processor.tokenizer.sep_token_id
    device = next(task.parameters()).device
    regions = Regions.whole_images(torch.arange(len(images)), processor.config.image_size)
    prompts = processor.pad([start] * len(images))
    written = task.predict(Batch(images, prompts, regions).to(device), torch.tensor(start, device=device), end).texts
    texts = processor.tokenizer.batch_decode(written.ids[:, len(start) :].cpu(), skip_special_tokens=True)
    return [[Captioned(record.id, tuple(record.captions), text)] for record, text in zip(records, texts, strict=True)]


def numbers(rows: Sequence[Captioned], *, java: bool = False) -> dict[str, float]:
    """CIDEr (CIDEr-D), BLEU-1 to BLEU-4 and ROUGE-L of the images that have captions; with ``java``, METEOR and SPICE.

    Raises:
        ValueError: no image has a caption.
        ModuleNotFoundError: for ``java``, pycocoevalcap is not installed.
    """
    known = [row for row in rows if row.references]
    written, references = in_words(known)
    cider = metrics.cider_d(written, references)
    found = {"CIDEr": sum(cider) / len(cider)}
    found |= {f"BLEU-{n}": score for n, score in enumerate(metrics.bleu(written, references), 1)}
    found["ROUGE-L"] = metrics.rouge_l(written, references)
    if java:
        said = {row.record: row.caption for row in known}
        found |= metrics.with_java(said, {row.record: row.references for row in known})
    return found


def in_words(rows: Sequence[Captioned]) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Captions and references as the metrics take them."""
    written = [metrics.words(row.caption) for row in rows]
    return written, [[metrics.words(caption) for caption in row.references] for row in rows]


def of_others(rows: Sequence[Captioned]) -> list[Captioned]:
    """Each image with the first caption that people wrote of the next one: what a model is compared with."""
    known = [row for row in rows if row.references]
    return [replace(row, caption=other.references[0]) for row, other in zip(known, known[1:] + known[:1], strict=True)]
