"""Shards to batches: streams of whole images with captions, and of regions with what they are called.

Which samples are in batch n, and what is done to each, follows from the seed and n: not from the number of processes or
workers, nor from where a run began.
"""

import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count, islice
from random import Random
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from xvlm.data.mentions import captions_of, mentions
from xvlm.data.mixture import Mixture
from xvlm.data.processor import Processor
from xvlm.data.reading import broken_if_undecodable, read_image
from xvlm.data.records import Record
from xvlm.data.shards import BrokenSample, Shards
from xvlm.data.stream_config import Kind, StreamConfig, locate
from xvlm.data.transforms import Augmented, augment, targets
from xvlm.data.words import WordMasking, mask_words
from xvlm.types import Batch, Masked, Movable, Regions

SHARE_NEEDS = 200  # samples before the share of skipped ones says anything
NAMED = 20  # skipped samples that an error names
STAND_INS = 200  # samples that are tried for a batch of which nothing is left


class UnusableData(RuntimeError):
    """Too many samples cannot be used; the message names them."""


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
        captions = captions_of(record, config, rng) if captioned else []
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
