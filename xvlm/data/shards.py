"""Records in tar shards that webdataset reads too, with an index that gives random access and an order per epoch.

A packed folder holds ``000000.tar``, ``000001.tar``, ... with members ``<id>.jpg`` (or ``.png``, ``.webp``) and
``<id>.json``, and an ``index.json`` that is written last: a folder without one is not packed. An index made by
:mod:`xvlm.data.tars` leads to tars elsewhere.
"""

import fcntl
import hashlib
import json
import logging
import os
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, NamedTuple

import numpy as np
from jaxtyping import Int
from pydantic import AfterValidator, Field, ValidationError
from tqdm import tqdm

from xvlm import hub
from xvlm.config import Configured
from xvlm.data.cache import Cache, is_remote
from xvlm.data.images import open_image
from xvlm.data.parallel import ordered_map
from xvlm.data.records import Record
from xvlm.hub import sha256
from xvlm.prose import counted

INDEX = "index.json"
JOURNAL = "packing.jsonl"  # of a folder that is not packed yet; locked by the process that packs it
REMARKS = "remarks.jsonl"
Extent = Annotated[int, Field(ge=0, lt=2**63)]  # bytes
BYTES_PER_SHARD = 1 << 29  # a shard that has them is full
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

    ``record`` is the image's name where ``why`` is absent: there is no record then. Where it is ``statements``, those
    about an image that was left out are missing from a record that is packed.
    """

    record: str
    why: Literal["unreadable", "leak", "absent", "statements", "rotated"]
    packed: bool
    message: str


class Prepared(NamedTuple):
    """What becomes of a sample on its way into a shard; None: it is left out, and the remark says why."""

    sample: tuple[Record, bytes] | None
    remark: Remark | None = None


def as_it_is(record: Record, image: bytes) -> Prepared:
    return Prepared((record, image))


class _Finished(Configured):
    """A line of the journal: a shard that stands, and what went into it.

    ``read``: how many samples, those left out included; ``source``: a digest of all of them.
    """

    shard: Shard
    read: int
    source: str
    counts: dict[str, int]
    remarks: list[Remark]


def write_shards(
    samples: Iterable[tuple[Record, bytes]],
    folder: Path,
    *,
    prepare: Callable[[Record, bytes], Prepared] = as_it_is,
    absent: Sequence[str] = (),
    workers: int = 0,
    samples_per_shard: int = 1000,
    description: dict | None = None,
    progress: bool,
) -> Index:
    """Pack records and their encoded images (JPEG, PNG or WebP). The same samples give the same bytes.

    Samples go to the disk one by one. Shards appear under their names once they are complete and read back as they were
    meant; one is full with ``samples_per_shard``, or with half a gigabyte. A journal beside them says what went into
    each; packing that was cut short goes on after the last shard whose samples, on reading them again, are the same
    ones, with the same description. The journal goes when the index comes. Remarks are in ``remarks.jsonl``. Statements
    go with the other image that they are about, where that was left out before them.

    Args:
        samples: may be read from the beginning more than once; an iterator, which cannot, is packed anew each time.
        prepare: what each sample goes through first, in ``workers`` processes (0: in this one); it must give equal
            results for equal samples, and differ only where the description does.
        absent: names of images that samples should have had, complete once all samples were read; they become remarks.

    Raises:
        FileExistsError: the folder is packed already, or another process is at it.
        ValueError: an id occurs twice or has a dot, bytes that are no image, or no samples; names the record.
        OSError: a shard does not read back as it was written.
    """
    header = {"description": description or {}, "samples": samples_per_shard, "bytes": BYTES_PER_SHARD}
    with _claimed(folder) as journal:
        finished, stream, whole = _continue(folder, journal, json.dumps(header).encode() + b"\n", samples)
        stream = tqdm(stream, desc=f"packing {folder}", unit="record", disable=not progress)
        seen = {row[0] for part in finished for row in part.shard.samples}
        digests: list[bytes] = []
        remarks: list[Remark] = []
        gone = {remark.record for part in finished for remark in part.remarks if not remark.packed}

        def kept() -> Iterator[tuple[Record, bytes]]:
            for digest, (sample, remark) in ordered_map(partial(_prepared, prepare), stream, workers):
                digests.append(digest)
                if remark is not None:
                    remarks.append(remark)
                if sample is None:
                    gone.add(remark.record)
                    continue
                record, image = sample
                if record.id in seen:
                    raise ValueError(f"record {record.id!r}: this id occurs twice; ids must be unique within {folder}")
                seen.add(record.id)
                told = [statement for statement in record.statements if statement.other not in gone]
                if lost := len(record.statements) - len(told):
                    message = f"without {counted(lost, 'statement')} about images that were left out"
                    remarks.append(Remark(record=record.id, why="statements", packed=True, message=message))
                    record = record.model_copy(update={"statements": told})
                yield record, image

        for first in (following := kept()):
            path = folder / f"{len(finished):06d}.tar"
            shard, counts = _write_shard(chain([first], following), path, samples_per_shard)
            read, source = len(digests), _together(digests)
            finished.append(_Finished(shard=shard, read=read, source=source, counts=counts, remarks=[*remarks]))
            journal.write(finished[-1].model_dump_json().encode() + b"\n")
            journal.flush()
            whole.update(b"".join(digests))
            digests.clear()
            remarks.clear()
        whole.update(b"".join(digests))
        remarks += [Remark(record=name, why="absent", packed=False, message="listed, but not there") for name in absent]
        return _conclude(folder, finished, remarks, description or {}, whole.hexdigest())


def source_digest(samples: Iterable[tuple[Record, bytes]]) -> str:
    """Of all records and images that a source gives, as the index of what was packed from it has it."""
    whole = hashlib.sha256()
    for sample in samples:
        whole.update(_digest(*sample))
    return whole.hexdigest()


def read_index(folder: Path) -> Index:
    """What a packed folder holds.

    Raises:
        FileNotFoundError, ValueError: it is not packed, or its index cannot be read.
    """
    return _read_index(folder / INDEX)


def read_remarks(folder: Path) -> list[Remark]:
    """What packing a folder left out or doubted."""
    file = folder / REMARKS
    return [Remark.model_validate_json(line) for line in file.read_bytes().splitlines()] if file.exists() else []


@contextmanager
def _claimed(folder: Path) -> Iterator[BinaryIO]:
    """The journal of a folder that is not packed yet, for this process alone."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / JOURNAL).open("a+b") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however that ends
        except BlockingIOError:
            raise FileExistsError(f"{folder}: another process is packing into this folder") from None
        if (folder / INDEX).exists():
            (folder / JOURNAL).unlink()
            raise FileExistsError(f"{folder / INDEX}: this folder is packed already")
        for leftover in folder.glob(".*.unfinished"):
            leftover.unlink()
        yield journal


def _continue(
    folder: Path, journal: BinaryIO, header: bytes, samples: Iterable[tuple[Record, bytes]]
) -> tuple[list[_Finished], Iterator[tuple[Record, bytes]], "hashlib._Hash"]:
    """The shards of an attempt that was cut short, as far as they are of this packing; the samples that follow; and the
    hash of those before, for :func:`source_digest`."""
    journal.seek(0)
    first, *lines = journal.readlines() or [b""]
    stream, whole = iter(samples), hashlib.sha256()
    finished: list[_Finished] = []
    for line in lines if first == header and stream is not samples else []:
        try:
            part = _Finished.model_validate_json(line if line.endswith(b"\n") else b"")
        except ValidationError:  # cut short itself
            break
        tar = folder / part.shard.file
        if not tar.exists() or sha256(tar) != part.shard.sha256:
            break
        digests = [_digest(*sample) for sample in islice(stream, part.read)]
        if _together(digests) != part.source:
            stream = islice(iter(samples), sum(before.read for before in finished), None)
            break
        whole.update(b"".join(digests))
        finished.append(part)
    journal.truncate(0)
    journal.write(b"".join([header, *lines[: len(finished)]]))
    journal.flush()
    return finished, stream, whole


def _conclude(folder: Path, finished: list[_Finished], remarks: list[Remark], description: dict, source: str) -> Index:
    """A folder of which all shards stand becomes a packed one.

    Args:
        remarks: those about samples behind the last shard.
    """
    remarks = [remark for part in finished for remark in part.remarks] + remarks
    if not finished:
        left_out = f"; {len(remarks)} were left out, the first because {remarks[0].message}" if remarks else ""
        raise ValueError(f"{folder}: there are no samples to pack{left_out}")
    if remarks:
        hub.write_atomically(folder / REMARKS, "".join(remark.model_dump_json() + "\n" for remark in remarks))
    written = {part.shard.file for part in finished}
    for leftover in folder.glob("[0-9]*.tar"):
        if leftover.name not in written:
            leftover.unlink()
    counts = _total(part.counts for part in finished)
    index = Index(description=description, source=source, counts=counts, shards=[part.shard for part in finished])
    hub.write_atomically(folder / INDEX, index.model_dump_json())
    (folder / JOURNAL).unlink()
    return index


def _prepared(prepare: Callable[[Record, bytes], Prepared], sample: tuple[Record, bytes]) -> tuple[bytes, Prepared]:
    return _digest(*sample), prepare(*sample)


def _digest(record: Record, image: bytes) -> bytes:
    return hashlib.sha256(hashlib.sha256(image).digest() + _document(record)).digest()


def _together(digests: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()


class _Written(NamedTuple):
    """What is kept of a sample in a shard that is written: its image may be large."""

    record: Record
    suffix: str
    image: bytes  # SHA-256


def _write_shard(
    samples: Iterable[tuple[Record, bytes]], path: Path, samples_per_shard: int
) -> tuple[Shard, dict[str, int]]:
    """A shard of as many samples as go in, and what to count in it."""
    from webdataset.writer import TarWriter

    written, size = [], 0
    with hub.replacing(path) as unfinished:
        with unfinished.open("wb") as file:
            # pax, because ustar has no room for names above 100 bytes
            style = {"mtime": 0, "user": "xvlm", "group": "xvlm", "mode": 0o644, "format": "PAX_FORMAT"}
            with TarWriter(file, encoder=False, **style) as writer:
                for record, image in samples:
                    suffix = _image_suffix(record, image)
                    size += writer.write({"__key__": _key(record), suffix: image, "json": _document(record)})
                    written.append(_Written(record, suffix, hashlib.sha256(image).digest()))
                    if len(written) == samples_per_shard or size >= BYTES_PER_SHARD:
                        break
        return _read_back(written, unfinished, path), _total(_counts(each.record) for each in written)


def _read_back(written: Sequence[_Written], unfinished: Path, path: Path) -> Shard:
    """Where everything is in a tar file; that it is there, and whole."""
    with tarfile.open(unfinished) as tar:
        members = {member.name: (member.offset_data, member.size) for member in tar}
    rows = []
    with unfinished.open("rb") as file:
        for record, suffix, digest in written:
            extents = members.get(f"{record.id}.{suffix}"), members.get(f"{record.id}.json")
            if None in extents:
                raise OSError(f"{path}: record {record.id!r} was written but is not there")
            image, document = (os.pread(file.fileno(), size, offset) for offset, size in extents)
            if hashlib.sha256(image).digest() != digest or Record.model_validate_json(document) != record:
                raise OSError(f"{path}: record {record.id!r} does not read back as it was written; is the disk sound?")
            rows.append((record.id, *extents[0], *extents[1]))
    return Shard(file=path.name, size=unfinished.stat().st_size, samples=rows, sha256=sha256(unfinished))


def _document(record: Record) -> bytes:
    return record.model_dump_json(exclude_defaults=True).encode()


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


def _total(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)


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
        index = _read_index(self.folder / INDEX)
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


def _read_index(path: Path) -> Index:
    try:
        return Index.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file, so {path.parent} is not a packed folder of shards") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


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
