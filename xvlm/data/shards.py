"""Records in tar shards that webdataset reads too, with an index that gives random access and an order per epoch.

A packed folder holds ``000000.tar``, ``000001.tar``, ... with members ``<id>.jpg`` (or ``.png``, ``.webp``) and
``<id>.json``, and an ``index.json`` that is written last: a folder without one is not packed.
"""

import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field, ValidationError
from tqdm import tqdm

from xvlm import hub
from xvlm.config import Configured
from xvlm.data.records import Record

INDEX = "index.json"
Extent = Annotated[int, Field(ge=0, lt=2**63)]  # bytes
OPEN_AT_ONCE = 64  # shards an instance keeps open


class BrokenSample(Exception):
    """A sample that cannot be read; training leaves it out and says so."""

    def __init__(self, shard: Path, key: str, reason: str):
        super().__init__(shard, key, reason)  # all three, so that it survives the way out of a worker process
        self.shard, self.key, self.reason = shard, key, reason

    def __str__(self) -> str:
        return f"{self.shard}/{self.key}: {self.reason}"


class Shard(Configured):
    """One tar file. ``samples``: key, image offset, image size, json offset, json size, in bytes of the file."""

    file: str
    size: int
    samples: list[tuple[str, Extent, Extent, Extent, Extent]]


class Index(Configured):
    """What a packed folder holds; ``counts`` is of the records and of everything said in them."""

    version: Literal[1] = 1
    description: dict = {}
    counts: dict[str, int]
    shards: list[Shard]


def write_shards(
    samples: Iterable[tuple[Record, bytes]],
    folder: Path,
    *,
    samples_per_shard: int = 1000,
    description: dict | None = None,
    progress: bool,
) -> Index:
    """Pack records and their encoded images (JPEG, PNG or WebP). The same samples give the same bytes.

    Shards appear under their names once they are complete; shards of an attempt that was cut short are replaced.

    Raises:
        FileExistsError: the folder is packed already.
        ValueError: an id occurs twice or has a dot, bytes that are no image, or no samples; names the record.
    """
    if (folder / INDEX).exists():
        raise FileExistsError(f"{folder / INDEX}: this folder is packed already")
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    counts: Counter[str] = Counter()
    shards: list[Shard] = []
    stream = iter(tqdm(samples, desc=f"packing {folder}", unit="record", disable=not progress))
    while part := list(islice(stream, samples_per_shard)):
        for record, _ in part:
            if record.id in seen:
                raise ValueError(f"record {record.id!r}: this id occurs twice; ids must be unique within {folder}")
            seen.add(record.id)
            counts.update(_counts(record))
        shards.append(_write_shard(part, folder / f"{len(shards):06d}.tar"))
    if not shards:
        raise ValueError(f"{folder}: there are no samples to pack")
    written = {shard.file for shard in shards}
    for leftover in folder.glob("[0-9]*.tar"):
        if leftover.name not in written:
            leftover.unlink()
    index = Index(description=description or {}, counts=dict(counts), shards=shards)
    hub.write_atomically(folder / INDEX, index.model_dump_json())
    return index


def _write_shard(samples: Sequence[tuple[Record, bytes]], path: Path) -> Shard:
    from webdataset.writer import TarWriter

    with hub.replacing(path) as unfinished, unfinished.open("wb") as file:
        # pax, because ustar has no room for names above 100 bytes
        writer = TarWriter(file, encoder=False, mtime=0, user="xvlm", group="xvlm", mode=0o644, format="PAX_FORMAT")
        with writer:
            for record, image in samples:
                document = record.model_dump_json(exclude_defaults=True).encode()
                writer.write({"__key__": _key(record), _image_suffix(record, image): image, "json": document})
        file.flush()
        size = file.tell()
        with tarfile.open(file.name) as tar:
            members = {member.name: (member.offset_data, member.size) for member in tar}
    rows = [
        (record.id, *members[f"{record.id}.{_image_suffix(record, image)}"], *members[f"{record.id}.json"])
        for record, image in samples
    ]
    return Shard(file=path.name, size=size, samples=rows)


def _key(record: Record) -> str:
    if "." in record.id:
        raise ValueError(f"record {record.id!r}: an id in a shard has no dot, because the first dot ends it")
    return record.id


def _image_suffix(record: Record, image: bytes) -> str:
    if image[:3] == b"\xff\xd8\xff":
        return "jpg"
    if image[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    raise ValueError(f"record {record.id!r}: expected a JPEG, PNG or WebP file, found bytes that begin {image[:8]!r}")


def _counts(record: Record) -> dict[str, int]:
    said = ("captions", "regions", "objects", "phrases", "expressions", "questions", "statements")
    return {"records": 1} | {name: len(getattr(record, name)) for name in said}


class Shards:
    """A packed folder as a sequence of samples, readable in any order and from any process.

    ``sizes``: samples of each shard; ``index`` is not kept, so that a million samples cost tens of megabytes.

    Raises:
        FileNotFoundError: the folder is not packed, or a shard of its index is missing.
        ValueError: an index that cannot be read; names it.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        index = _read_index(self.folder / INDEX)
        self.description, self.counts = index.description, index.counts
        self.files = [self.folder / shard.file for shard in index.shards]
        if missing := [file.name for file in self.files if not file.exists()]:
            raise FileNotFoundError(
                f"{self.folder}: {len(missing)} of {len(self.files)} shards are missing, first {missing[0]}"
            )
        self.sizes = [len(shard.samples) for shard in index.shards]
        self._ends = np.cumsum(self.sizes)
        self._keys = np.array([sample[0] for shard in index.shards for sample in shard.samples])
        self._extents = np.array([sample[1:] for shard in index.shards for sample in shard.samples])
        self._open: dict[tuple[int, int], BinaryIO] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}

    def key(self, i: int) -> str:
        """The id of sample ``i``."""
        return str(self._keys[i])

    def shard_of(self, i: int) -> int:
        """The number of the shard that holds sample ``i``."""
        return int(np.searchsorted(self._ends, i, side="right"))

    def read(self, i: int) -> tuple[Record, bytes]:
        """Record and encoded image of sample ``i``.

        Raises:
            BrokenSample: the shard ends early, or what it holds is not the record of the index.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"{self.folder}: sample {i} of {len(self)}")
        shard = self.shard_of(i)
        image_at, image_size, json_at, json_size = self._extents[i].tolist()
        image = self._read(shard, i, image_at, image_size)
        document = self._read(shard, i, json_at, json_size)
        try:
            record = Record.model_validate_json(document)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "json"
            raise BrokenSample(self.files[shard], self.key(i), f"not a record: {where}: {first['msg']}") from None
        if record.id != self.key(i):
            raise BrokenSample(self.files[shard], self.key(i), f"the shard holds the record {record.id!r} here")
        return record, image

    def _read(self, shard: int, i: int, offset: int, size: int) -> bytes:
        file = self._file(shard).fileno()
        there = min(size, max(0, os.fstat(file).st_size - offset))
        if there < size:  # asked first: reading takes memory for all that an index says
            reason = f"the shard ends early ({there} of {size} bytes at {offset})"
            raise BrokenSample(self.files[shard], self.key(i), reason)
        return os.pread(file, size, offset)

    def _file(self, shard: int) -> BinaryIO:
        """The open shard; a forked process opens its own."""
        opened = (os.getpid(), shard)
        if opened not in self._open:
            if len(self._open) >= OPEN_AT_ONCE:
                del self._open[next(iter(self._open))]
            self._open[opened] = self.files[shard].open("rb", buffering=0)
        return self._open[opened]


def _read_index(path: Path) -> Index:
    try:
        return Index.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file, so {path.parent} is not a packed folder of shards") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def epoch_order(sizes: Sequence[int], seed: int, epoch: int, window: int = 8) -> Int[np.ndarray, "sample"]:
    """All samples once, in an order that depends on (seed, epoch) only, not on processes or workers.

    Shards are shuffled, then samples within windows of consecutive shards, so that a reader touches few files at once.

    Args:
        sizes: samples of each shard; sample numbers run through the shards in this order.
        window: shards in a window.
    """
    random = np.random.default_rng([seed, epoch])
    starts = np.cumsum([0, *sizes])
    shards = random.permutation(len(sizes))
    order = []
    for first in range(0, len(shards), window):
        inside = [np.arange(starts[s], starts[s + 1]) for s in shards[first : first + window]]
        order.append(random.permutation(np.concatenate(inside)))
    return np.concatenate(order)
