"""Shards to batches: the two streams of pre-training, whole images with captions and regions with what they are called.

Which samples are in batch n, and what is done to each, follows from the seed and n: not from the number of processes or
workers, nor from where a run began.
"""

import logging
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from xvlm.boxes import merge
from xvlm.config import Configured
from xvlm.data.processor import Processor, Undecodable, open_image, rgb, to_tensor
from xvlm.data.records import Box, Object, Record
from xvlm.data.shards import BrokenSample, Shards, epoch_order
from xvlm.data.transforms import AugmentConfig, augment, targets
from xvlm.data.words import WordMasking, mask_words
from xvlm.types import Batch, Masked, Regions

Grain = Literal["caption", "region"]
Kind = Literal["region", "object", "phrase", "expression"]
Count = Annotated[int, Field(ge=1)]

SHARE_NEEDS = 200  # samples before the share of skipped ones says anything
NAMED = 20  # skipped samples that an error names

logger = logging.getLogger(__name__)


class UnusableData(RuntimeError):
    """Too many samples cannot be used; the message names them."""


class StreamConfig(Configured):
    """One stream of batches. Of ``augment``, a region stream has its own defaults: keep_box, colour."""

    shards: Annotated[list[Path], Field(min_length=1)]  # folders; read as one
    grain: Grain
    images: Count  # of an update, over all processes
    max_regions: Count = 5  # texts of an image; its captions are among them, and come first
    max_texts: Count | None = None  # of an update, over all processes; more are dropped at random
    with_caption: bool = True  # in a region stream: what is said about the whole image too, where there is something
    captions: Literal["any", "first"] = "any"  # which of a record's captions; the first of a scene is complete
    max_captions: Count = 1  # of an image
    kinds: Annotated[list[Kind], Field(min_length=1)] = ["region", "object", "phrase", "expression"]
    # adjectives before an object's label: one at random (X-VLM), all, or each with probability 1/2
    attributes: Literal["one", "all", "some"] = "one"
    augment: AugmentConfig = AugmentConfig()
    workers: Annotated[int, Field(ge=0)] = 2
    max_skipped_share: Annotated[float, Field(ge=0, le=1)] = 0.05

    @model_validator(mode="after")
    def captions_leave_room_for_regions(self) -> "StreamConfig":
        if self.grain == "region" and self.with_caption and 1 < self.max_regions <= self.max_captions:
            raise ValueError(
                f"max_captions {self.max_captions} leave no region among the {self.max_regions} texts of an image"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def regions_keep_their_boxes(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("grain") != "region":
            return values
        given = values.get("augment", {})
        if not isinstance(given, dict):
            return values
        return values | {"augment": {"crop": "keep_box", "randaugment": "colour"} | given}


def loader(
    config: StreamConfig,
    processor: Processor,
    masking: WordMasking | None,
    *,
    seed: int,
    start: int,
    rank: int = 0,
    world: int = 1,
    turns: int = 1,
) -> Iterator[Batch]:
    """Batches without end, from batch ``start`` of the run on.

    Batch n holds samples n * images to (n + 1) * images of the epochs laid end to end; each process has its part of
    them, as ``turns`` batches one after the other. A sample that cannot be used is left out and named in
    ``Batch.skipped``.

    Args:
        masking: None leaves ``Batch.masked`` out.
        seed: of the run.
        rank, world: this process and how many there are.
        turns: into how many batches a process divides its part.

    Raises:
        ValueError: ``images`` or ``max_texts`` cannot be divided among the processes and their turns.
        FileNotFoundError: see :class:`Shards`.
        UnusableData: (while reading) a batch without any usable sample, or too many skipped; names them.
    """
    for name in ("images", "max_texts"):
        if (getattr(config, name) or 0) % (world * turns):
            among = f"{world} processes" + (f" with {turns} turns each" if turns > 1 else "")
            raise ValueError(f"{name}: {getattr(config, name)} cannot be divided among {among}")
    stream = _Stream(config, processor, masking, seed, rank, world, turns)
    batches = DataLoader(
        stream,
        batch_size=None,  # the stream's items are batches already
        sampler=count(start * turns),
        num_workers=config.workers,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_interrupts_to_the_parent,
    )
    return _watched(batches, config.max_skipped_share, config.images // (world * turns))


def _as_it_is(batch: "Batch | _Unusable") -> "Batch | _Unusable":
    return batch


def _leave_interrupts_to_the_parent(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(frozen=True)
class _Unusable:
    """A batch of which nothing is left."""

    skipped: tuple[str, ...]


def _watched(batches: "DataLoader[Batch | _Unusable]", max_share: float, images: int) -> Iterator[Batch]:
    seen, lost, named = 0, 0, []
    for batch in batches:
        seen += images
        lost += len(batch.skipped)
        named = (named + list(batch.skipped))[:NAMED]
        if seen >= SHARE_NEEDS and lost > max_share * seen:
            raise UnusableData(
                f"{lost} of {seen} samples were skipped, more than max_skipped_share={max_share}:\n" + "\n".join(named)
            )
        if isinstance(batch, _Unusable):
            raise UnusableData("no sample of a batch has a text that can be used:\n" + "\n".join(batch.skipped))
        yield batch


# One sample.


@dataclass(frozen=True)
class _Said:
    """One text as ids, with its words hidden, and where in the image it is: pixels, whole image or not."""

    ids: list[int]
    masked: list[int]
    hidden: list[bool]
    box_xywh: list[float]
    whole: bool


@dataclass(frozen=True)
class _Sample:
    place: int  # in the order of the run
    record: Record
    pixels: UInt8[Tensor, "3 height width"]
    said: list[_Said]


def read_image(shards: Shards, i: int) -> tuple[Record, Image.Image]:
    """A record and its image, of which only the header has been decoded.

    Raises:
        BrokenSample: also where the image cannot be opened or has not the record's size.
    """
    record, data = shards.read(i)
    with _broken_if_undecodable(shards, i):
        image = open_image(data)
    if image.size != (record.width, record.height):
        found = f"image is {image.width}x{image.height}, the record says {record.width}x{record.height}"
        raise BrokenSample(shards.files[shards.shard_of(i)], record.id, found)
    return record, image


@contextmanager
def _broken_if_undecodable(shards: Shards, i: int) -> Iterator[None]:
    try:
        yield
    except Undecodable as error:
        file = shards.files[shards.shard_of(i)]
        raise BrokenSample(file, shards.key(i), f"image cannot be decoded: {error}") from None


def mentions(
    record: Record, kinds: Sequence[Kind], attributes: Literal["one", "all", "some"], rng: Random
) -> list[tuple[str, Box]]:
    """Texts about parts of an image with their boxes (``xyxy``): a region, object, phrase or expression each."""
    found: list[tuple[str, Box]] = []
    if "region" in kinds:
        found += [(rng.choice(region.descriptions), region.box_xyxy) for region in record.regions]
    if "object" in kinds:
        found += [(_object_text(thing, attributes, rng), thing.box_xyxy) for thing in record.objects]
    if "phrase" in kinds:
        for phrase in record.phrases:
            if phrase.boxes_xyxy:
                text = record.captions[phrase.caption][phrase.start : phrase.end]
                around = merge(torch.tensor(phrase.boxes_xyxy, dtype=torch.float64)).tolist()
                found.append((text, tuple(around)))
    if "expression" in kinds:
        found += [(said.text, said.box_xyxy) for said in record.expressions if said.box_xyxy is not None]
    return found


def _captions(record: Record, config: StreamConfig, rng: Random) -> list[str]:
    if config.captions == "first":
        return record.captions[: config.max_captions]
    if config.max_captions == 1:  # as the reference draws it
        return [rng.choice(record.captions)]
    return rng.sample(record.captions, min(config.max_captions, len(record.captions)))


def _object_text(thing: Object, attributes: Literal["one", "all", "some"], rng: Random) -> str:
    chosen = thing.attributes
    if attributes == "one" and chosen:
        chosen = [rng.choice(chosen)]
    elif attributes == "some":
        chosen = [attribute for attribute in chosen if rng.random() < 0.5]
    return " ".join([*chosen, thing.label])


class _Stream(Dataset):
    """Item n is turn ``n % turns`` of this process's part of batch ``n // turns``."""

    def __init__(
        self,
        config: StreamConfig,
        processor: Processor,
        masking: WordMasking | None,
        seed: int,
        rank: int,
        world: int,
        turns: int,
    ):
        self.config, self.processor, self.masking = config, processor, masking
        self.seed, self.rank, self.turns, self.parts = seed, rank, turns, world * turns
        self.folders = [Shards(folder) for folder in config.shards]
        self.sizes = [size for shards in self.folders for size in shards.sizes]
        self.ends = np.cumsum([len(shards) for shards in self.folders])
        self._order: tuple[int, np.ndarray] | None = None  # the epoch it is of

    def __getitem__(self, item: int) -> Batch | _Unusable:
        n, turn = divmod(item, self.turns)
        part, mine = self.rank * self.turns + turn, self.config.images // self.parts
        first = n * self.config.images + part * mine
        samples, skipped = [], []
        for place in range(first, first + mine):
            try:
                samples.append(self._sample(place))
            except BrokenSample as broken:
                skipped.append(f"{broken.shard.parent.name}/{broken.shard.name}/{broken.key}: {broken.reason}")
        texts = [(sample, said) for sample in samples for said in sample.said]
        if self.config.max_texts is not None and len(texts) > (most := self.config.max_texts // self.parts):
            rng = Random(f"{self.seed} texts {n} {part} {self.config.grain}")
            texts = [texts[i] for i in sorted(rng.sample(range(len(texts)), most))]
        return self._batch(texts, tuple(skipped)) if texts else _Unusable(tuple(skipped))

    def _at(self, place: int) -> tuple[int, int]:
        """Epoch and sample at a place in the order of the run."""
        epoch, offset = divmod(place, int(self.ends[-1]))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(self.sizes, self.seed, epoch)
        return epoch, int(self._order[1][offset])

    def _sample(self, place: int) -> _Sample:
        config, size = self.config, self.processor.config.image_size
        epoch, index = self._at(place)
        folder = int(np.searchsorted(self.ends, index, side="right"))
        shards, i = self.folders[folder], index - (int(self.ends[folder - 1]) if folder else 0)
        record, image = read_image(shards, i)
        rng = Random(f"{self.seed} {epoch} {index} {config.grain}")
        captioned = bool(record.captions) and (config.grain == "caption" or config.with_caption)
        captions = _captions(record, config, rng) if captioned else []
        parts = mentions(record, config.kinds, config.attributes, rng) if config.grain == "region" else []
        if not (parts if config.grain == "region" else captions):
            wanted = "caption" if config.grain == "caption" else f"{', '.join(config.kinds)} with a box"
            raise BrokenSample(shards.files[shards.shard_of(i)], record.id, f"the record has no {wanted}")

        boxes_xyxy = torch.tensor([box for _, box in parts], dtype=torch.float64).reshape(-1, 4)
        texts = captions + [text for text, _ in parts]
        anchor = rng.randrange(len(parts)) if parts else None
        resampling = self.processor.config.resampling
        with _broken_if_undecodable(shards, i):
            seen = augment(image, boxes_xyxy, texts, anchor, config.augment, size, rng, resampling)
        whole = [0.0, 0.0, float(size[1]), float(size[0])]
        wanted = [(text, whole, True) for text in seen.texts[: len(captions)]]
        visible = [
            (seen.texts[len(captions) + part], box, False)
            for part, box in zip(seen.kept, seen.boxes_xywh.tolist(), strict=True)
        ]
        wanted += rng.sample(visible, len(visible))
        said = self._said(wanted, rng)
        if not said and wanted:
            raise BrokenSample(shards.files[shards.shard_of(i)], record.id, "no text has words once it is cleaned")
        return _Sample(place, record, to_tensor(seen.image), said)

    def _said(self, wanted: Sequence[tuple[str, list[float], bool]], rng: Random) -> list[_Said]:
        """The first ``max_regions`` texts that have words."""
        said: list[_Said] = []
        for text, box_xywh, whole in wanted:
            if len(said) == self.config.max_regions:
                break
            try:
                ids, continues = self.processor.encode(text)
            except ValueError:
                continue
            masked, hidden = ids, [False] * len(ids)
            if self.masking is not None:
                masked, hidden = mask_words(
                    ids, continues, self.masking, rng, self.processor.mask_id, self.processor.vocab_size
                )
            said.append(_Said(ids, masked, hidden, box_xywh, whole))
        return said

    def _batch(self, texts: Sequence[tuple[_Sample, _Said]], skipped: tuple[str, ...]) -> Batch:
        """Images that have a text left, with their texts."""
        samples: list[_Sample] = []
        for sample, _ in texts:
            if not samples or samples[-1] is not sample:
                samples.append(sample)
        number = {id(sample): i for i, sample in enumerate(samples)}
        boxes_xywh = torch.tensor([said.box_xywh for _, said in texts], dtype=torch.float64)
        padded = self.processor.pad([said.ids for _, said in texts])
        masked = None
        if self.masking is not None:
            ids = self.processor.pad([said.masked for _, said in texts]).ids
            hidden = torch.zeros_like(padded.mask)
            hidden[padded.mask] = torch.tensor([h for _, said in texts for h in said.hidden])
            masked = Masked(ids, hidden)
        return Batch(
            images=self.processor.normalise(torch.stack([sample.pixels for sample in samples])),
            texts=padded,
            regions=Regions(
                image=torch.tensor([number[id(sample)] for sample, _ in texts]),
                boxes_cxcywh=targets(boxes_xywh, self.processor.config.image_size),
                boxes_xywh=boxes_xywh,
                whole=torch.tensor([said.whole for _, said in texts]),
            ),
            masked=masked,
            ids=tuple(sample.record.id for sample in samples),
            skipped=skipped,
            sources=dict(Counter(sample.record.source for sample, _ in texts)),
            places=torch.tensor([sample.place for sample in samples]),
        )


# Evaluation.


def records(
    shards: Shards, processor: Processor, indices: Sequence[int], batch_size: int
) -> Iterator[tuple[list[Record], Float[Tensor, "image 3 height width"]]]:
    """Every record once, in the order of ``indices``, with its resized and normalised image; ``batch_size`` at a time.

    Broken samples are left out, counted and logged.
    """
    broken: list[str] = []
    for first in range(0, len(indices), batch_size):
        some, images = [], []
        for i in indices[first : first + batch_size]:
            try:
                record, image = read_image(shards, i)
                with _broken_if_undecodable(shards, i):
                    image = rgb(image)
            except BrokenSample as error:
                broken.append(str(error))
                continue
            some.append(record)
            images.append(processor.pixel_values(image))
        if some:
            yield some, torch.stack(images)
    if broken:
        logger.warning("left out %d of %d records:\n%s", len(broken), len(indices), "\n".join(broken[:NAMED]))
