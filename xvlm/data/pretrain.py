"""Shards to batches: the two streams of pre-training, whole images with captions and regions with what they are called.

Which samples are in batch n, and what is done to each, follows from the seed and n: not from the number of processes or
workers, nor from where a run began.
"""

import logging
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from xvlm.boxes import merge
from xvlm.config import Configured
from xvlm.data import tars
from xvlm.data.cache import Cache
from xvlm.data.images import Undecodable, open_image, rgb
from xvlm.data.mixture import Mixture
from xvlm.data.processor import Processor
from xvlm.data.records import Box, Object, Record
from xvlm.data.shards import BrokenSample, Shards
from xvlm.data.transforms import AugmentConfig, Augmented, augment, targets
from xvlm.data.words import WordMasking, mask_words
from xvlm.types import Batch, Masked, Movable, Regions

Grain = Literal["caption", "region", "question", "statement"]
Kind = Literal["region", "object", "phrase", "expression"]
Kinds = Annotated[list[Kind], Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Entries = Annotated[list[Annotated[str, BeforeValidator(str)]], Field(min_length=1)]

SHARE_NEEDS = 200  # samples before the share of skipped ones says anything
NAMED = 20  # skipped samples that an error names
STAND_INS = 200  # samples that are tried for a batch of which nothing is left

logger = logging.getLogger(__name__)


class UnusableData(RuntimeError):
    """Too many samples cannot be used; the message names them."""


class SourceConfig(Configured):
    """A source of a mixture, with epochs of its own."""

    shards: Entries
    weight: Annotated[float, Field(gt=0)] = 1.0  # of its images, beside those of the other sources
    kinds: Kinds | None = None  # null: the stream's


class StreamConfig(Configured):
    """One stream of batches. Of ``augment``, a region stream has its own defaults: keep_box, colour.

    Questions and statements are what fine-tuning reads, see :mod:`xvlm.tasks.vqa` and :mod:`xvlm.tasks.nlvr`; of what
    is said below about texts, ``images``, ``max_regions`` and ``max_texts`` concern them.
    """

    shards: Entries | None = None  # packed folders, or tars: see xvlm/data/tars.py; read as one
    sources: dict[str, SourceConfig] | None = None  # instead of `shards`: several, mixed by weight
    cache: Cache = Cache()  # of tars that come from URLs and pipes
    grain: Grain
    images: Count  # of an update, over all processes
    max_regions: Count = 5  # texts of an image; its captions are among them, and come first
    max_texts: Count | None = None  # of an update, over all processes; more are dropped at random
    with_caption: bool = True  # in a region stream: what is said about the whole image too, where there is something
    captions: Literal["any", "first"] = "any"  # which of a record's captions; the first of a scene is complete
    max_captions: Count = 1  # of an image
    kinds: Kinds = ["region", "object", "phrase", "expression"]
    # adjectives before an object's label: one at random (X-VLM), all, or each with probability 1/2
    attributes: Literal["one", "all", "some"] = "one"
    augment: AugmentConfig = AugmentConfig()
    workers: Annotated[int, Field(ge=0)] = 2
    max_skipped_share: Annotated[float, Field(ge=0, le=1)] = 0.05

    @model_validator(mode="after")
    def shards_or_sources(self) -> "StreamConfig":
        if (self.shards is None) == (not self.sources):
            raise ValueError("give either shards (read as one) or sources (mixed by weight); the other one is null")
        return self

    @property
    def mixture(self) -> dict[str, SourceConfig]:
        """The sources by name; ``shards`` are one source without a name."""
        return self.sources or {"": SourceConfig(shards=self.shards)}

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


def locate(config: StreamConfig) -> dict[str, list[Path]]:
    """The packed folders of each source; tars without an index get one: see :func:`xvlm.data.tars.locate`."""
    return {
        name: [tars.locate(entry, config.cache) for entry in source.shards] for name, source in config.mixture.items()
    }


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

    Batch n holds samples n * images to (n + 1) * images of the epochs laid end to end (of a mixture: see
    :class:`Mixture`); each process has its part of them, as ``turns`` batches one after the other. A sample that cannot
    be used is left out and named in ``Batch.skipped``. Where that leaves nothing, the next sample of the same turn that
    can be used stands in, so that every process has a batch whenever the others have one.

    Args:
        masking: None leaves ``Batch.masked`` out.
        seed: of the run.
        rank, world: this process and how many there are.
        turns: into how many batches a process divides its part.

    Raises:
        ValueError: ``images`` or ``max_texts`` cannot be divided among the processes and their turns.
        OSError: see :class:`Shards` and :func:`locate`.
        UnusableData: (while reading) a batch for which no usable sample is found, or too many skipped; names them.
    """
    return Stream(config, processor, masking, seed, rank, world, turns).batches(start)


def _as_it_is(batch: "Movable | _Unusable") -> "Movable | _Unusable":
    return batch


def _leave_interrupts_to_the_parent(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(frozen=True)
class _Unusable:
    """A batch of which nothing is left."""

    skipped: tuple[str, ...]


def _watched(batches: "DataLoader[Movable | _Unusable]", max_share: float, images: int) -> Iterator[Movable]:
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
            raise UnusableData(
                f"no sample of a batch, nor of the {STAND_INS} after it, has a text that can be used:\n"
                + "\n".join(batch.skipped)
            )
        yield batch


# One sample.


@dataclass(frozen=True)
class Said:
    """One text as ids, with its words hidden, what kind it is, and where in the image: pixels."""

    ids: list[int]
    masked: list[int]
    hidden: list[bool]
    kind: Literal["caption", "question", Kind]
    box_xywh: list[float]

    @property
    def whole(self) -> bool:
        return self.kind in ("caption", "question")


@dataclass(frozen=True)
class Sample:
    place: int  # in the order of the run
    record: Record
    source: str
    pixels: UInt8[Tensor, "3 height width"]
    said: list[Said]


def read_image(shards: Shards, i: int) -> tuple[Record, Image.Image]:
    """A record and its image, of which only the header has been decoded.

    Raises:
        BrokenSample: also where the image cannot be opened or has not the record's size.
    """
    record, data = shards.read(i)
    with broken_if_undecodable(shards, i):
        image = open_image(data)
    if image.size != (record.width, record.height):
        found = f"image is {image.width}x{image.height}, the record says {record.width}x{record.height}"
        raise shards.broken(i, found)
    return record, image


@contextmanager
def broken_if_undecodable(shards: Shards, i: int) -> Iterator[None]:
    """Turns what is wrong with the image of a sample into a BrokenSample that names it."""
    try:
        yield
    except Undecodable as error:
        raise shards.broken(i, str(error)) from None


def mentions(
    record: Record, kinds: Sequence[Kind], attributes: Literal["one", "all", "some"], rng: Random
) -> list[tuple[Kind, str, Box]]:
    """What kind of text about a part of an image, the text, and its box (``xyxy``)."""
    found: list[tuple[Kind, str, Box]] = []
    if "region" in kinds:
        found += [("region", rng.choice(region.descriptions), region.box_xyxy) for region in record.regions]
    if "object" in kinds:
        found += [("object", _object_text(thing, attributes, rng), thing.box_xyxy) for thing in record.objects]
    if "phrase" in kinds:
        for phrase in record.phrases:
            if phrase.boxes_xyxy:
                text = record.captions[phrase.caption][phrase.start : phrase.end]
                around = merge(torch.tensor(phrase.boxes_xyxy, dtype=torch.float64)).tolist()
                found.append(("phrase", text, tuple(around)))
    if "expression" in kinds:
        found += [("expression", said.text, said.box_xyxy) for said in record.expressions if said.box_xyxy is not None]
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


class Stream(Dataset):
    """Item n is turn ``n % turns`` of this process's part of batch ``n // turns``; see :func:`loader`.

    What is made of a record (:meth:`sample`) and of the samples (:meth:`batch`) is for a task to choose.
    """

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
        for name in ("images", "max_texts"):
            if (getattr(config, name) or 0) % (world * turns):
                among = f"{world} processes" + (f" with {turns} turns each" if turns > 1 else "")
                raise ValueError(f"{name}: {getattr(config, name)} cannot be divided among {among}")
        self.config, self.processor, self.masking = config, processor, masking
        self.seed, self.rank, self.turns, self.parts = seed, rank, turns, world * turns
        self.folders = {
            name: [Shards(folder, config.cache) for folder in folders] for name, folders in locate(config).items()
        }
        self.kinds = {name: source.kinds or config.kinds for name, source in config.mixture.items()}
        sizes = {name: [size for shards in folders for size in shards.sizes] for name, folders in self.folders.items()}
        self.order = Mixture(sizes, {name: source.weight for name, source in config.mixture.items()}, seed)

    def batches(self, start: int) -> Iterator[Movable]:
        """Batches without end, from batch ``start`` of the run on."""
        batches = DataLoader(
            self,
            batch_size=None,  # the stream's items are batches already
            sampler=count(start * self.turns),
            num_workers=self.config.workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_interrupts_to_the_parent,
            generator=torch.Generator(),  # else opening a stream draws from the run's, whose dropout depends on when
        )
        return _watched(batches, self.config.max_skipped_share, self.config.images // self.parts)

    def __getitem__(self, item: int) -> Movable | _Unusable:
        samples, skipped = [], []
        for place in self._places(item):
            try:
                samples.append(self._read(place))
            except BrokenSample as broken:
                file = "/".join(broken.shard.split("/")[-2:])
                skipped.append(f"{file}/{broken.key}: {broken.reason}")
        if not any(sample.said for sample in samples):
            samples = self._stand_in(item)
        texts = [(sample, said) for sample in samples for said in sample.said]
        if self.config.max_texts is not None and len(texts) > (most := self.config.max_texts // self.parts):
            n, turn = divmod(item, self.turns)
            rng = Random(f"{self.seed} texts {n} {self.rank * self.turns + turn} {self.config.grain}")
            texts = [texts[i] for i in sorted(rng.sample(range(len(texts)), most))]
        return self.batch(texts, tuple(skipped)) if texts else _Unusable(tuple(skipped))

    def _places(self, item: int) -> range:
        """Where in the order of the run the samples of an item are."""
        n, turn = divmod(item, self.turns)
        mine = self.config.images // self.parts
        first = n * self.config.images + (self.rank * self.turns + turn) * mine
        return range(first, first + mine)

    def _stand_in(self, item: int) -> list[Any]:
        """The next sample of the same turn with a text that can be used, if it is near."""
        later = chain.from_iterable(map(self._places, count(item + self.turns, self.turns)))
        for place in islice(later, STAND_INS):
            with suppress(BrokenSample):  # it is named when its turn comes
                sample = self._read(place)
                if sample.said:
                    return [sample]
        return []

    def _read(self, place: int) -> Any:  # a Sample, or what a task makes of one
        source, epoch, index = self.order.at(place)
        rng = Random(f"{self.seed} {epoch} {index} {self.config.grain}{source}")
        return self.sample(place, source, *self._find(source, index), rng)

    def sample(self, place: int, source: str, shards: Shards, i: int, rng: Random) -> Sample:
        """An image with texts about it, as the model is to see them.

        Args:
            place: of the sample in the order of the run.
            source: its name in a mixture, else empty.
            i: the sample's number in ``shards``.

        Raises:
            BrokenSample: it cannot be used.
        """
        config = self.config
        record, image = read_image(shards, i)
        captioned = bool(record.captions) and (config.grain == "caption" or config.with_caption)
        captions = _captions(record, config, rng) if captioned else []
        kinds = self.kinds[source]
        parts = mentions(record, kinds, config.attributes, rng) if config.grain == "region" else []
        if not (parts if config.grain == "region" else captions):
            wanted = "caption" if config.grain == "caption" else f"{', '.join(kinds)} with a box"
            raise shards.broken(i, f"the record has no {wanted}")

        boxes_xyxy = torch.tensor([box for _, _, box in parts], dtype=torch.float64).reshape(-1, 4)
        texts = captions + [text for _, text, _ in parts]
        anchor = rng.randrange(len(parts)) if parts else None
        seen = self.augmented(shards, i, image, rng, texts, boxes_xyxy, anchor)
        height, width = seen.pixels.shape[1:]
        whole = [0.0, 0.0, float(width), float(height)]
        wanted = [("caption", text, whole) for text in seen.texts[: len(captions)]]
        visible = [
            (parts[part][0], seen.texts[len(captions) + part], box)
            for part, box in zip(seen.kept, seen.boxes_xywh.tolist(), strict=True)
        ]
        wanted += rng.sample(visible, len(visible))
        said = self._said(wanted, rng)
        if not said and wanted:
            raise shards.broken(i, "no text has words once it is cleaned")
        return Sample(place, record, source or record.source, seen.pixels, said)

    def augmented(
        self,
        shards: Shards,
        i: int,
        image: Image.Image,
        rng: Random,
        texts: Sequence[str] = (),
        boxes_xyxy: Float[Tensor, "n 4"] | None = None,
        keep: int | None = None,
    ) -> Augmented:
        """The image of a sample as the stream's configuration has it augmented; see :func:`augment`.

        Raises:
            BrokenSample: it cannot be decoded.
        """
        boxes_xyxy = torch.zeros(0, 4) if boxes_xyxy is None else boxes_xyxy
        size, resampling = self.processor.config.image_size, self.processor.config.resampling
        with broken_if_undecodable(shards, i):
            return augment(image, boxes_xyxy, texts, keep, self.config.augment, size, rng, resampling)

    def _find(self, source: str, index: int) -> tuple[Shards, int]:
        """The folder that holds a sample of a source, and the sample's number in it."""
        for shards in self.folders[source]:
            if index < len(shards):
                return shards, index
            index -= len(shards)
        raise IndexError(f"source {source!r} has no sample {index} more")

    def _said(self, wanted: Sequence[tuple[Literal["caption", Kind], str, list[float]]], rng: Random) -> list[Said]:
        """The first ``max_regions`` texts that have words."""
        said: list[Said] = []
        for kind, text, box_xywh in wanted:
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
            said.append(Said(ids, masked, hidden, kind, box_xywh))
        return said

    def batch(self, texts: Sequence[tuple[Sample, Said]], skipped: tuple[str, ...]) -> Batch:
        """Images that have a text left, with their texts."""
        samples: list[Sample] = []
        for sample, _ in texts:
            if not samples or samples[-1] is not sample:
                samples.append(sample)
        number = {id(sample): i for i, sample in enumerate(samples)}
        seen = Counter(f"{sample.source}/images" for sample in samples)
        seen.update(f"{sample.source}/{said.kind}s" for sample, said in texts)
        boxes_xywh = torch.tensor([said.box_xywh for _, said in texts], dtype=torch.float64)
        padded = self.processor.pad([said.ids for _, said in texts])
        masked = None
        if self.masking is not None:
            ids = self.processor.pad([said.masked for _, said in texts]).ids
            hidden = torch.zeros_like(padded.mask)
            hidden[padded.mask] = torch.tensor([h for _, said in texts for h in said.hidden])
            masked = Masked(ids, hidden)
        return Batch(
            images=self.processor.normalise([sample.pixels for sample in samples]),
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
            seen=dict(seen),
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
                with broken_if_undecodable(shards, i):
                    images.append(processor.pixel_values(rgb(image)))
            except BrokenSample as error:
                broken.append(str(error))
                continue
            some.append(record)
        if some:
            yield some, torch.stack(images)
    if broken:
        logger.warning("left out %d of %d records:\n%s", len(broken), len(indices), "\n".join(broken[:NAMED]))
