"""Records into tar shards: whole or not at all, the same bytes from the same samples, and resumable."""

import fcntl
import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pydantic import ValidationError
from tqdm import tqdm

from xvlm import hub
from xvlm.config import Configured
from xvlm.data.cache import lock
from xvlm.data.parallel import ordered_map
from xvlm.data.records import Record
from xvlm.data.shards import INDEX, REMARKS, Index, Remark, Shard
from xvlm.hub import sha256
from xvlm.prose import counted

JOURNAL = "packing.jsonl"  # of a folder that is not packed yet; locked by the process that packs it
BYTES_PER_SHARD = 1 << 29  # a shard that has them is full


class Prepared(NamedTuple):
    """What becomes of a sample on its way into a shard; None: it is left out, and the last remark says why."""

    sample: tuple[Record, bytes] | None
    remarks: tuple[Remark, ...] = ()


def as_it_is(record: Record, image: bytes) -> Prepared:
    return Prepared((record, image))


class _Finished(Configured):
    """A line of the journal: a shard that stands, and what went into it.

    ``read``: how many samples, those left out included; ``source``: a digest of all of them; ``awaited``: records whose
    statements are about another image that had not come yet, and that image.
    """

    shard: Shard
    read: int
    source: str
    counts: dict[str, int]
    remarks: list[Remark]
    awaited: list[tuple[str, str]] = []


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
    go with the other image that they are about, where that was left out before them; remarks tell of those that stay
    although that image was left out behind them, or never came.

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
        awaited: list[tuple[str, str]] = []
        gone = {remark.record for part in finished for remark in part.remarks if not remark.packed}

        def kept() -> Iterator[tuple[Record, bytes]]:
            for digest, (sample, told_of) in ordered_map(partial(_prepared, prepare), stream, workers):
                digests.append(digest)
                remarks.extend(told_of)
                if sample is None:
                    gone.add(told_of[-1].record)
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
                awaited.extend((record.id, statement.other) for statement in told if statement.other not in seen)
                yield record, image

        for first in (following := kept()):
            path = folder / f"{len(finished):06d}.tar"
            shard, counts = _write_shard(chain([first], following), path, samples_per_shard)
            read, source = len(digests), _together(digests)
            about = {"remarks": [*remarks], "awaited": [*awaited]}
            finished.append(_Finished(shard=shard, read=read, source=source, counts=counts, **about))
            journal.write(finished[-1].model_dump_json().encode() + b"\n")
            journal.flush()
            whole.update(b"".join(digests))
            digests.clear()
            remarks.clear()
            awaited.clear()
        whole.update(b"".join(digests))
        remarks += [Remark(record=name, why="absent", packed=False, message="listed, but not there") for name in absent]
        dangling = Counter(name for part in finished for name, other in part.awaited if other not in seen)
        for name, count in dangling.items():
            message = f"with {counted(count, 'statement')} about images that are not here"
            remarks.append(Remark(record=name, why="statements", packed=True, message=message))
        return _conclude(folder, finished, remarks, description or {}, whole.hexdigest())


def source_digest(samples: Iterable[tuple[Record, bytes]]) -> str:
    """Of all records and images that a source gives, as the index of what was packed from it has it."""
    whole = hashlib.sha256()
    for sample in samples:
        whole.update(_digest(*sample))
    return whole.hexdigest()


@contextmanager
def _claimed(folder: Path) -> Iterator[BinaryIO]:
    """The journal of a folder that is not packed yet, for this process alone."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / JOURNAL).open("a+b") as journal:
        try:
            lock(journal, folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"{folder}: another process is packing into this folder") from None
        if (folder / INDEX).exists():
            (folder / JOURNAL).unlink(missing_ok=True)  # the other process may just have finished, and removed it
            raise FileExistsError(f"{folder / INDEX}: this folder is packed already")
        for leftover in [*folder.glob(".*.unfinished"), folder / REMARKS]:
            leftover.unlink(missing_ok=True)
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
