"""Which training images are evaluation images: by where they come from, and by how they look."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from einops import reduce
from jaxtyping import Int8
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from tqdm import tqdm

from xvlm.data.images import decode_image
from xvlm.data.parallel import ordered_map
from xvlm.data.records import Record
from xvlm.data.shards import Shards

NEAR = 6  # bits of 64 in which two pictures of the same photograph may differ; docs/data.md says what that finds
ALIKE = 20  # bits; crops of a photograph differ in fewer, other photographs in about 32
STRUCTURE, COLOUR = 0.6, 0.8  # cosines; of copies they are 0.9 and more, of pages of text 0.5, of other colours 0
EQUAL = 0.9  # structure that needs no colours to bear it out, of pictures with details
DETAIL, DETAILED = 6, 0.45  # of 127, in a share of the thumbnail; of a shape on white, more than half is plain
COLOURLESS = 4.0  # of 127; a grey copy has no colours to compare

_FREQUENCIES, _POSITIONS = np.arange(8)[:, None], np.arange(32)
_COSINES = np.cos(np.pi / 32 * (_POSITIONS + 0.5) * _FREQUENCIES)
_PROBES = np.array([0, *(1 << bit for bit in range(16))], dtype=np.uint16)


class Look(NamedTuple):
    """What is kept of a picture to know it again, a kilobyte.

    The hash is 64 bits that survive resizing, squashing and recompression, but neither a flip nor a crop of more than a
    little: the signs of the 8x8 lowest frequencies of a 32x32 grey thumbnail about their median (Zauner 2010, "pHash").
    It is made for photographs. Pages of text, or single shapes on white, share their lowest frequencies, and are told
    apart by the rest: how each part of the thumbnail differs from what is around it, and colours.
    """

    hash: int
    structure: Int8[np.ndarray, "32 32"]
    """Grey less the mean of the 5x5 around it; the largest is 127."""
    colour: Int8[np.ndarray, "8 8 2"]
    """Cb and Cr, about grey."""


def look_at(image: Image.Image) -> Look:
    """What a picture looks like."""
    small = image.convert("RGB").resize((32, 32), Image.Resampling.LANCZOS).convert("YCbCr")
    channels = np.asarray(small, dtype=np.float64)
    grey = channels[..., 0]
    spectrum = (_COSINES @ grey @ _COSINES.T).ravel()
    bits = spectrum > np.median(spectrum[1:])  # the first is the brightness, which is far from all others
    around = sliding_window_view(np.pad(grey, 2, "edge"), (5, 5)).mean((-2, -1))
    structure = (grey - around) * (127 / max(1.0, np.abs(grey - around).max()))
    colour = reduce(channels[..., 1:] - 128, "(y yy) (x xx) c -> y x c", "mean", yy=4, xx=4)
    packed = int.from_bytes(np.packbits(bits).tobytes(), "big")
    return Look(packed, structure.round().astype(np.int8), colour.round().clip(-127, 127).astype(np.int8))


def same_picture(one: Look, other: Look) -> bool:
    """Whether two pictures whose hashes are near are copies of one, as far as their thumbnails tell."""
    structure = _cosine(one.structure, other.structure)
    if structure < STRUCTURE:
        return False
    if structure >= EQUAL and all((abs(look.structure) > DETAIL).mean() > DETAILED for look in (one, other)):
        return True  # whatever was done to the colours
    coloured = all(np.square(look.colour, dtype=np.float64).mean() > COLOURLESS**2 for look in (one, other))
    return not coloured or _cosine(one.colour, other.colour) >= COLOUR


def _cosine(one: Int8[np.ndarray, "..."], other: Int8[np.ndarray, "..."]) -> float:
    """Of two arrays as vectors; 1 where both are zero."""
    a, b = (each.ravel().astype(np.float64) for each in (one, other))
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    return float(a @ b / (lengths[0] * lengths[1])) if all(lengths) else float(not any(lengths))


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


class Looks:
    """Finds all copies of a picture among many, without looking at each."""

    def __init__(self, looks: Sequence[Look]):
        self.looks, self.hashes = looks, Hashes([look.hash for look in looks])

    def near(self, look: Look) -> list[Near]:
        """Nearest first."""
        return [near for near in self.hashes.near(look.hash) if same_picture(self.looks[near.index], look)]


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
        looks = []
        for folder in folders:
            shards = Shards(folder)
            known = ordered_map(_known, map(shards.read, range(len(shards))), workers)
            bar = tqdm(known, desc=f"looking at {folder}", unit="record", total=len(shards), disable=not progress)
            for i, (called, look) in enumerate(bar):
                if look is None:
                    raise ValueError(f"{folder}: record {shards.key(i)}: image cannot be decoded; see xvlm data check")
                self.named |= {name: len(self.own) for name in called}
                self.own.append(called[0])
                self.described.append(f"{shards.key(i)} of {folder}")
                looks.append(look)
        self.looks = Looks(looks)

    def match(self, record: Record, image: Image.Image) -> str | None:
        """Which evaluation image this is, in words; None: none of them."""
        look = look_at(image)
        own, *_ = called = names(record)
        for name in called:
            i = self.named.get(name)
            if i is None:
                continue
            # Own data is often numbered anew in each file; an id given by the same source has to be borne out.
            if name == own == self.own[i] and (self.looks.looks[i].hash ^ look.hash).bit_count() > ALIKE:
                continue
            return f"the same photograph as {self.described[i]} ({name})"
        if near := self.looks.near(look):
            return f"looks like {self.described[near[0].index]} ({near[0].distance} of 64 bits differ)"
        return None


def _known(sample: tuple[Record, bytes]) -> tuple[list[str], Look | None]:
    record, image = sample
    try:
        return names(record), look_at(decode_image(image))
    except ValueError:
        return names(record), None
