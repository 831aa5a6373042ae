"""Records in tar shards that webdataset reads too, with an index that gives random access and an order per epoch.

A packed folder holds ``000000.tar``, ``000001.tar``, ... with members ``<id>.jpg`` (or ``.png``, ``.webp``) and
``<id>.json``, and an ``index.json`` that is written last: a folder without one is not packed. An index made by
:mod:`xvlm.data.tars` leads to tars elsewhere.
"""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import numpy as np
from jaxtyping import Int
from pydantic import AfterValidator, Field, ValidationError

from xvlm.config import Configured
from xvlm.data.cache import Cache, is_remote
from xvlm.data.images import open_image
from xvlm.data.records import Record

INDEX = "index.json"
REMARKS = "remarks.jsonl"
Extent = Annotated[int, Field(ge=0, lt=2**63)]  # bytes
OPEN_AT_ONCE = 16  # shards an instance keeps open: twice a window of `epoch_order`
AGAIN_AFTER = 600.0  # seconds until a shard that cannot be read is tried again

logger = logging.getLogger(__name__)


class BrokenSample(Exception):
    """A sample that cannot be read; training leaves it out and says so."""

    def __init__(self, shard: str, key: str, reason: str):
        super().__init__(shard, key, reason)  # all three, so that it survives the way out of a worker process
        self.shard, self.key, self.reason = shard, key, reason

    def __str__(self) -> str:
        return f"{self.shard}/{self.key}: {self.reason}"


def leads_to_tar(file: str) -> str:
    """The place of a shard as it is. An index may come from anyone, so that of files it leads to tars only.

    Raises:
        ValueError: a path that does not end in ``.tar``.
    """
    if not is_remote(file) and not file.endswith(".tar"):
        raise ValueError(f"{file}: expected a file whose name ends in .tar")
    return file


class Shard(Configured):
    """One tar file. ``samples``: key, image offset, image size, text offset, text size, in bytes of the file.

    ``sha256`` is of the file; empty in folders packed before it was kept, and of tars of others.
    """

    file: Annotated[str, AfterValidator(leads_to_tar)]  # in the folder of the index; or a path, a URL or a pipe
    size: int
    text: Literal["json", "txt"] = "json"  # a record, or a caption
    samples: list[tuple[str, Extent, Extent, Extent, Extent]]
    sha256: str = ""


class Index(Configured):
    """What a packed folder holds; ``counts`` is of the records and of everything said in them.

    ``source`` is the :func:`source_digest` of what was read; empty where it was not kept, and of tars of others.
    """

    version: Literal[1] = 1
    description: dict = {}
    source: str = ""
    counts: dict[str, int]
    shards: list[Shard]


class Remark(Configured):
    """What there is to say about a record that was left out, or packed although something speaks against it.

    ``record`` is the image's name where ``why`` is absent: there is no record then. Where it is ``statements``, a
    record is packed of which some are about an image that is not; those of an image left out before it are left out.
    """

    record: str
    why: Literal["unreadable", "leak", "absent", "statements", "rotated"]
    packed: bool
    message: str


def read_index(folder: Path) -> Index:
    """What a packed folder holds.

    Raises:
        FileNotFoundError, ValueError: it is not packed, or its index cannot be read.
    """
    path = folder / INDEX
    try:
        return Index.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file, so {folder} is not a packed folder of shards") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def read_remarks(folder: Path) -> list[Remark]:
    """What packing a folder left out or doubted."""
    file = folder / REMARKS
    return [Remark.model_validate_json(line) for line in file.read_bytes().splitlines()] if file.exists() else []


class Shards:
    """A packed folder as a sequence of samples, readable in any order and from any process.

    ``sizes``: samples of each shard; ``index`` is not kept, so that a million samples cost tens of megabytes.

    Args:
        cache: where shards from elsewhere are kept.

    Raises:
        FileNotFoundError: the folder is not packed, or a shard of its index is missing.
        PermissionError: the index leads to a command that nobody gave here; see :meth:`Cache.trust`.
        ValueError: an index that cannot be read; names it.
    """

    def __init__(self, folder: Path | str, cache: Cache = Cache()):  # noqa: B008 (it never changes)
        self.folder, self.cache = Path(folder), cache
        index = read_index(self.folder)
        self.description, self.counts = index.description, index.counts
        self.files = [shard.file if is_remote(shard.file) else str(self.folder / shard.file) for shard in index.shards]
        if missing := [file for file in self.files if not is_remote(file) and not Path(file).is_file()]:
            raise FileNotFoundError(
                f"{self.folder}: {len(missing)} of {len(self.files)} shards are missing, first {missing[0]}"
            )
        for file in self.files:
            cache.check(file)
        self.sizes = [len(shard.samples) for shard in index.shards]
        self._bytes = [shard.size for shard in index.shards]
        self._captions = [shard.text == "txt" for shard in index.shards]
        self._ends = np.cumsum(self.sizes)
        self._keys = np.array([sample[0] for shard in index.shards for sample in shard.samples])
        self._extents = np.array([sample[1:] for shard in index.shards for sample in shard.samples])
        self._numbers: dict[str, int] | None = None  # of the keys; made when first asked for
        self._open: dict[tuple[int, int], BinaryIO] = {}
        self._lost: dict[int, tuple[str, float]] = {}  # shards that cannot be read: why, and since when

    def __len__(self) -> int:
        return len(self._keys)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}, "_numbers": None}

    def key(self, i: int) -> str:
        """The id of sample ``i``."""
        return str(self._keys[i])

    def find(self, key: str) -> int:
        """The number of the sample with this id.

        Raises:
            KeyError: there is none.
        """
        if self._numbers is None:
            self._numbers = {name: i for i, name in enumerate(self._keys.tolist())}
        return self._numbers[key]

    def shard_of(self, i: int) -> int:
        """The number of the shard that holds sample ``i``."""
        return int(np.searchsorted(self._ends, i, side="right"))

    def read(self, i: int) -> tuple[Record, bytes]:
        """Record and encoded image of sample ``i``.

        Raises:
            BrokenSample: the shard is gone or ends early, or what it holds is not the record of the index.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"{self.folder}: sample {i} of {len(self)}")
        shard = self.shard_of(i)
        image_at, image_size, text_at, text_size = self._extents[i].tolist()
        try:
            image = self._read(shard, image_at, image_size)
            text = self._read(shard, text_at, text_size)
            return self._record(shard, self.key(i), image, text), image
        except (OSError, ValueError) as error:
            raise self.broken(i, str(error)) from None

    def records(self) -> Iterator[Record]:
        """Every record that can be read, in order; broken ones are left out and logged."""
        for i in range(len(self)):
            try:
                yield self.read(i)[0]
            except BrokenSample as broken:
                logger.warning("left out: %s", broken)

    def broken(self, i: int, reason: str) -> BrokenSample:
        """What to raise over sample ``i``."""
        return BrokenSample(self.files[self.shard_of(i)], self.key(i), reason)

    def _record(self, shard: int, key: str, image: bytes, text: bytes) -> Record:
        name = key.rpartition("/")[2]
        if self._captions[shard]:
            return captioned(name, self.files[shard], image, text)
        try:
            record = Record.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "json"
            raise ValueError(f"not a record: {where}: {first['msg']}") from None
        if record.id != name:
            raise ValueError(f"the shard holds the record {record.id!r} here")
        return record

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        file = self._file(shard).fileno()
        there = min(size, max(0, os.fstat(file).st_size - offset))
        if there < size:  # asked first: reading takes memory for all that an index says
            raise ValueError(f"the shard ends early ({there} of {size} bytes at {offset})")
        return os.pread(file, size, offset)

    def _file(self, shard: int) -> BinaryIO:
        """The open shard; a forked process opens its own.

        Raises:
            OSError: it cannot be read, or could not a while ago.
        """
        opened = (os.getpid(), shard)
        if opened not in self._open:
            reason, since = self._lost.get(shard, ("", -AGAIN_AFTER))
            if time.monotonic() - since < AGAIN_AFTER:
                raise OSError(reason)
            try:
                file = self.cache.open(self.files[shard])
                if (found := os.fstat(file.fileno()).st_size) > self._bytes[shard]:
                    raise OSError(f"it has {found} bytes, the index in {self.folder} says {self._bytes[shard]}")
            except OSError as error:
                self._lost[shard] = f"the shard cannot be read: {error}", time.monotonic()
                raise OSError(self._lost[shard][0]) from None
            if len(self._open) >= OPEN_AT_ONCE:
                del self._open[next(iter(self._open))]
            self._open[opened] = file
        return self._open[opened]


def captioned(name: str, place: str, image: bytes, text: bytes) -> Record:
    """A record of an encoded image and its caption, UTF-8; the source is the folder of the tar, ``place``.

    Raises:
        ValueError: either of them is unreadable or empty.
    """
    width, height = open_image(image).size
    caption = text.decode().strip()
    if not caption:
        raise ValueError("the caption is empty")
    source = Path(place).parent.name or "tars"
    return Record(id=name, source=source, width=width, height=height, captions=[caption])


def epoch_order(
    sizes: Sequence[int], seed: int, epoch: int, window: int = 8, key: str = ""
) -> Int[np.ndarray, "sample"]:
    """All samples once, in an order that depends on (seed, epoch, key) only, not on processes or workers.

    Shards are shuffled, then samples within windows of consecutive shards, so that a reader touches few files at once.

    Args:
        sizes: samples of each shard; sample numbers run through the shards in this order.
        window: shards in a window.
        key: gives sources of one run orders of their own.
    """
    random = np.random.default_rng([seed, epoch, *key.encode()])
    starts = np.cumsum([0, *sizes])
    shards = random.permutation(len(sizes))
    order = []
    for first in range(0, len(shards), window):
        inside = [np.arange(starts[s], starts[s + 1]) for s in shards[first : first + window]]
        order.append(random.permutation(np.concatenate(inside)))
    return np.concatenate(order)
