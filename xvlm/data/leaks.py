"""Which training images are evaluation images: by where they come from, and by how they look."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from xvlm.data.images import decode_image
from xvlm.data.parallel import ordered_map
from xvlm.data.records import Record
from xvlm.data.shards import Shards

NEAR = 6  # bits of 64 in which two pictures of the same photograph may differ; docs/data.md says what that finds
ALIKE = 20  # bits; crops of a photograph differ in fewer, other photographs in about 32

_FREQUENCIES, _POSITIONS = np.arange(8)[:, None], np.arange(32)
_COSINES = np.cos(np.pi / 32 * (_POSITIONS + 0.5) * _FREQUENCIES)
_PROBES = np.array([0, *(1 << bit for bit in range(16))], dtype=np.uint16)


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that survive resizing, squashing and recompression, but neither a flip nor a crop of more than a little.

    The signs of the 8x8 lowest frequencies of a 32x32 grey thumbnail about their median (Zauner 2010, "pHash").
    """
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    spectrum = (_COSINES @ grey @ _COSINES.T).ravel()
    bits = spectrum > np.median(spectrum[1:])  # the first is the brightness, which is far from all others
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


class Near(NamedTuple):
    """The position of a hash in the list that was searched, and in how many bits it differs."""

    index: int
    distance: int


class Hashes:
    """Finds all hashes within ``NEAR`` bits of one, without looking at each.

    Of four parts of 16 bits, one differs in at most one bit where all together differ in at most seven: 68 exact
    look-ups give every candidate.
    """

    def __init__(self, hashes: Sequence[int]):
        self.hashes = np.array(hashes, dtype=np.uint64)
        parts = self.hashes.view(np.uint16).reshape(-1, 4).T
        self._orders = [np.argsort(part, kind="stable") for part in parts]
        self._sorted = [part[order] for part, order in zip(parts, self._orders, strict=True)]

    def near(self, perceptual: int) -> list[Near]:
        """Nearest first."""
        wanted = np.array([perceptual], dtype=np.uint64)
        found = [np.array([], dtype=np.int64)]
        for part, order, keys in zip(wanted.view(np.uint16), self._orders, self._sorted, strict=True):
            starts, ends = (np.searchsorted(keys, part ^ _PROBES, side) for side in ("left", "right"))
            found += [order[start:end] for start, end in zip(starts, ends, strict=True) if start < end]
        candidates = np.unique(np.concatenate(found))
        differing = (self.hashes[candidates] ^ wanted).view(np.uint8).reshape(-1, 8)
        distances = np.unpackbits(differing, axis=1).sum(1)
        nearest = np.argsort(distances, kind="stable")
        return [Near(int(candidates[i]), int(distances[i])) for i in nearest if distances[i] <= NEAR]


def names(record: Record) -> list[str]:
    """What a photograph is called, its own name first: "coco:123456" is one in COCO, Visual Genome and RefCOCO."""
    called = [(record.source, record.id), *record.same_as.items()]
    # Numbers are published with and without leading zeros.
    return [f"{source}:{int(number) if number.isdecimal() else number}" for source, number in called]


class Guard:
    """The images of packed evaluation sets, to be kept out of a training set.

    Raises:
        FileNotFoundError, ValueError: a folder that is not packed, or an image of it that cannot be decoded.
    """

    def __init__(self, folders: Sequence[Path], workers: int = 0, *, progress: bool = False):
        self.described: list[str] = []
        self.own: list[str] = []
        self.named: dict[str, int] = {}
        hashes = []
        for folder in folders:
            shards = Shards(folder)
            known = ordered_map(_known, map(shards.read, range(len(shards))), workers)
            bar = tqdm(known, desc=f"looking at {folder}", unit="record", total=len(shards), disable=not progress)
            for i, (called, perceptual) in enumerate(bar):
                if perceptual is None:
                    raise ValueError(f"{folder}: record {shards.key(i)}: image cannot be decoded; see xvlm data check")
                self.named |= {name: len(self.own) for name in called}
                self.own.append(called[0])
                self.described.append(f"{shards.key(i)} of {folder}")
                hashes.append(perceptual)
        self.hashes = Hashes(hashes)

    def match(self, record: Record, image: Image.Image) -> str | None:
        """Which evaluation image this is, in words; None: none of them."""
        perceptual = perceptual_hash(image)
        own, *_ = called = names(record)
        for name in called:
            i = self.named.get(name)
            if i is None:
                continue
            # Own data is often numbered anew in each file; an id given by the same source has to be borne out.
            if name == own == self.own[i] and (int(self.hashes.hashes[i]) ^ perceptual).bit_count() > ALIKE:
                continue
            return f"the same photograph as {self.described[i]} ({name})"
        if near := self.hashes.near(perceptual):
            return f"looks like {self.described[near[0].index]} ({near[0].distance} of 64 bits differ)"
        return None


def _known(sample: tuple[Record, bytes]) -> tuple[list[str], int | None]:
    record, image = sample
    try:
        return names(record), perceptual_hash(decode_image(image))
    except ValueError:
        return names(record), None
