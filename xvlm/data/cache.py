"""Files from URLs and pipes, brought to this disk when they are needed and kept there up to a limit."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Annotated, BinaryIO

from pydantic import Field

from xvlm import hub
from xvlm.config import Configured

TRIES = 3
TRUSTED = "trusted"  # the folder of commands that may be run
_HARMLESS = re.compile(r"(https?|gs|hf)://")  # read by a program that takes an address, not by a shell


def is_remote(place: str) -> bool:
    """Whether a place is a URL or a ``pipe:`` command, not a path."""
    return place.startswith("pipe:") or "://" in place


def _may_run(place: str) -> bool:
    """Whether opening a place may run what it says; of other kinds of URLs, webdataset decides what they do."""
    return is_remote(place) and not _HARMLESS.match(place)


def digest(*places: str) -> str:
    """A file name for places whose own names may be anything."""
    return hashlib.sha256("\n".join(places).encode()).hexdigest()[:16]


class Cache(Configured):
    """Files from elsewhere, shared by all processes of a machine. What was not opened for longest goes first; an open
    file stays readable to its reader, and takes up space until that reader lets go of it.
    """

    folder: Path = Path("~/.cache/xvlm")
    gigabytes: Annotated[float, Field(gt=0)] = 50.0

    @property
    def root(self) -> Path:
        return self.folder.expanduser()

    def open(self, place: str) -> BinaryIO:
        """A path as it is; a URL or pipe after it was fetched, by one process while the others wait.

        Raises:
            PermissionError: a command that nobody gave here; see :meth:`trust`.
            OSError: there is no such file, or it cannot be fetched (after three tries); names the place.
        """
        if not is_remote(place):
            if not Path(place).is_file():  # a named pipe would never end
                raise FileNotFoundError(f"{place}: no such file")
            return Path(place).open("rb", buffering=0)
        self.check(place)
        kept = self.root / "files" / digest(place)
        with alone(kept):
            try:
                file = kept.open("rb", buffering=0)
            except FileNotFoundError:
                file = self._fetch(place, kept)
            now = time.time_ns()  # finer than the clock that files get their times from
            os.utime(file.fileno(), ns=(now, now))
            return file

    def trust(self, places: Iterable[str]) -> None:
        """Note the commands among places that the user named: no others are run because an index leads to them.

        The default cache has a note as well, if it can be written to: an index may be opened with that one.
        """
        for place in filter(_may_run, places):
            self._note(place)
            with suppress(OSError):
                Cache()._note(place)

    def _note(self, place: str) -> None:
        note = self.root / TRUSTED / digest(place)
        if not note.exists():
            note.parent.mkdir(parents=True, exist_ok=True)
            hub.write_atomically(note, place)

    def check(self, place: str) -> None:
        """Raises PermissionError over a command that nobody gave to :meth:`trust`, of this cache or the default one."""
        notes = [cache.root / TRUSTED / digest(place) for cache in (self, Cache())]
        if _may_run(place) and not any(note.exists() and note.read_text("utf-8") == place for note in notes):
            raise PermissionError(
                f"{place}: an index leads to this, and commands in files are not run; if you trust it, name it "
                "where shards are named, or give it to xvlm data index"
            )

    def _fetch(self, place: str, kept: Path) -> BinaryIO:
        from webdataset.gopen import gopen

        for tries_left in reversed(range(TRIES)):
            try:
                with hub.replacing(kept) as unfinished:
                    with gopen(place) as source, unfinished.open("wb") as copy:
                        shutil.copyfileobj(source, copy, 1 << 20)
                    file = unfinished.open("rb", buffering=0)  # before another process can make room by removing it
                break
            except (OSError, ValueError) as error:  # ValueError: no command is known for this kind of URL
                if not tries_left:
                    raise OSError(f"{place}: cannot be fetched: {error}") from None
        self._make_room(kept)
        return file

    def _make_room(self, newest: Path) -> None:
        with alone(newest.parent):
            files = [(file.stat(), file) for file in newest.parent.glob("[!.]*") if file != newest]
            room = self.gigabytes * 1e9 - newest.stat().st_size - sum(stat.st_size for stat, _ in files)
            for stat, file in sorted(files, key=lambda each: each[0].st_mtime_ns):
                if room >= 0:
                    break
                file.unlink()
                room += stat.st_size


def lock(file: IO, path: Path, how: int = fcntl.LOCK_EX) -> None:
    """Lock an open file until it is closed, or its process ends, however that does.

    Raises:
        BlockingIOError: with ``LOCK_NB``, another process has it.
        OSError: the file system of ``path`` has no locks.
    """
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        raise OSError(
            f"{path}: files cannot be locked on this file system ({error.strerror}); choose a folder on another, "
            "such as a local disk"
        ) from None


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time, for each path; a process that is killed holds nobody up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as held:
        lock(held, path.parent)
        yield
