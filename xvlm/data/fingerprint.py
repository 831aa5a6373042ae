"""Whether a source may have changed since it was packed, told without reading its files."""

import hashlib
import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


def fingerprint(folder: Path, absent: Collection[str], leave_out: Path) -> str:
    """Of the names, sizes and times of all files that are no images, and of those absent images that are there now.

    Photographs cost a look at their names; one that is replaced under its name changes nothing here.

    Args:
        folder: of the source.
        absent: names of images that the source lists but did not have.
        leave_out: a folder that may lie in the source's and is none of it.
    """
    wanted = {Path(name).stem for name in absent}
    whole = hashlib.sha256()
    for path in _files(folder, {leave_out.resolve()}):
        if path.suffix.lower() not in IMAGES:
            whole.update(_line(path, folder))
        elif path.stem in wanted:
            whole.update(f"{path.stem}\n".encode(errors="replace"))
    for name in sorted(absent):  # those that lie outside: an absolute path, one with ..
        with suppress(OSError):  # a name may be too long for one
            if (folder / name).is_file():
                whole.update(f"{name}\n".encode(errors="replace"))
    return whole.hexdigest()


def fingerprint_beside(folder: Path) -> str:
    """Of the JSON files in a folder itself, where a reader of files that were named finds what belongs to them."""
    whole = hashlib.sha256()
    for path in sorted(folder.glob("*.json")):
        if path.is_file():
            whole.update(_line(path, folder))
    return whole.hexdigest()


def _line(path: Path, folder: Path) -> bytes:
    about = path.stat()
    return f"{path.relative_to(folder)}\0{about.st_size}\0{about.st_mtime_ns}\n".encode(errors="replace")


def _files(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """In order; behind links too, each folder once. What nobody can read is left out, since no reader did."""
    seen.add(folder.resolve())
    try:
        with os.scandir(folder) as entries:
            inside = sorted(entries, key=lambda each: each.name)
    except PermissionError:
        return
    for each in inside:
        path = Path(each.path)
        if each.is_file(follow_symlinks=False) or (each.is_symlink() and path.is_file()):
            yield path
        elif path.is_dir() and path.resolve() not in seen:
            yield from _files(path, seen)
