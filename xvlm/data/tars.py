"""Tars that others wrote, in webdataset's layout, from paths, URLs and pipes: with an index they are as good as packed.

A sample is the members that share a name up to the first dot of its last part: an image, and a ``.txt`` with its
caption or else a ``.json`` with a :class:`~xvlm.data.records.Record`. Nothing is unpacked: members are byte ranges, and
links, devices and the like are no members.
"""

import logging
import os
import re
import shutil
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from xvlm import hub
from xvlm.data.cache import Cache, alone, digest, is_remote
from xvlm.data.shards import INDEX, Index, Shard, leads_to_tar

IMAGES = ("jpg", "jpeg", "png", "webp")
MAX_MEMBER = 1 << 28  # bytes; no photograph or caption is larger
AT_ONCE = 4  # tars that are fetched at the same time

logger = logging.getLogger(__name__)


def locate(entry: str, cache: Cache) -> Path:
    """The folder with the index of one entry of a stream's ``shards``: a packed folder is its own.

    Tars (a URL, a ``pipe:`` command or a path, with ``{000..099}`` for many; paths may have ``*``) are indexed once, in
    the cache, from where an attempt that was cut short had got to.

    Raises:
        FileNotFoundError: no tar matches.
        OSError: a tar cannot be fetched.
        ValueError: none of the tars holds a sample.
    """
    if not is_remote(entry) and (Path(entry).is_dir() or not re.search(r"\.tar$|[*?{]", entry)):
        return Path(entry)
    places = expand([entry])
    cache.trust(places)
    folder = cache.root / "indexes" / digest(*places)
    with alone(folder):
        if not (folder / INDEX).exists():
            write_index(places, folder, cache)
    return folder


def expand(entries: Sequence[str]) -> list[str]:
    """Every tar that entries with braces and stars stand for, as URLs, pipes and absolute paths.

    Raises:
        FileNotFoundError: an entry matches nothing.
        ValueError: a file whose name does not end in ``.tar``.
    """
    from braceexpand import braceexpand

    places = []
    for entry in entries:
        if _is_file(entry):  # whatever its name looks like: a shell puts in what it finds, even pipe:...tar
            places.append(leads_to_tar(str(Path(entry).absolute())))
            continue
        for place in braceexpand(entry):
            found = [place] if is_remote(place) else _matching(Path(place).absolute())
            if not found:
                raise FileNotFoundError(f"{place}: no such file")
            places += map(leads_to_tar, found)
    return places


def _is_file(entry: str) -> bool:
    try:
        return Path(entry).is_file()
    except OSError:  # a command may be too long for a name
        return False


def _matching(pattern: Path) -> list[str]:
    return sorted(map(str, Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))))


def write_index(places: Sequence[str], folder: Path, cache: Cache, *, progress: bool = True) -> Index:
    """Read every tar once and write the folder's ``index.json``; tars in the folder itself may move with it.

    Commands among the places are trusted from now on: whoever calls this names them.

    Raises:
        FileExistsError: the folder has an index already.
        OSError: a tar cannot be fetched.
        ValueError: none of them holds a sample.
    """
    if (folder / INDEX).exists():
        raise FileExistsError(f"{folder / INDEX}: this folder has an index already")
    cache.trust(places)
    parts = folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)

    def shard(place: str) -> Shard:
        part = parts / f"{digest(place)}.json"
        if not part.exists():
            with cache.open(place) as file:
                hub.write_atomically(part, scan(file, place).model_dump_json())
        return Shard.model_validate_json(part.read_bytes())

    with ThreadPoolExecutor(AT_ONCE) as pool:
        shards = list(tqdm(pool.map(shard, places), "indexing", len(places), unit="tar", disable=not progress))
    inside = f"{folder.absolute()}/"
    shards = [s.model_copy(update={"file": s.file.removeprefix(inside)}) for s in shards if s.samples]
    if not shards:
        raise ValueError(f"{places[0]}{' …' * (len(places) > 1)}: no tar holds an image with a .txt or .json")
    counts = {"records": sum(len(shard.samples) for shard in shards)}
    index = Index(description={"tars": list(places)}, counts=counts, shards=shards)
    hub.write_atomically(folder / INDEX, index.model_dump_json())
    shutil.rmtree(parts)
    return index


def scan(file: BinaryIO, place: str) -> Shard:
    """Where the samples of an open tar lie. What cannot be used is left out, and the log says how much."""
    size = os.fstat(file.fileno()).st_size
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    reason = ""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                tar.members = []  # else all of them are kept
                named = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]+)", member.name)
                within = member.size <= MAX_MEMBER and member.offset_data + member.size <= size
                if named and within and member.isreg() and not member.issparse():
                    suffix = "jpg" if named[2].lower() in IMAGES else named[2].lower()
                    samples.setdefault(named[1], {}).setdefault(suffix, (member.offset_data, member.size))
    except tarfile.TarError as error:
        reason = f"; it cannot be read to its end: {error}"
    text = "txt" if any("txt" in members for members in samples.values()) else "json"
    rows = [
        (key, *members["jpg"], *members[text]) for key, members in samples.items() if {"jpg", text} <= members.keys()
    ]
    if reason or len(rows) < len(samples):
        logger.warning("%s: %d of %d samples have an image and a .%s%s", place, len(rows), len(samples), text, reason)
    return Shard(file=place, size=size, text=text, samples=rows)
