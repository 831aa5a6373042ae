"""Reads GRIT: web images whose captions' noun phrases and expressions are tied to boxes.

As img2dataset downloads the published tables (Peng et al. 2023, https://huggingface.co/datasets/zzliang/GRIT) with
``--save_additional_columns '["noun_chunks", "ref_exps"]'``, as tar files or unpacked::

    folder/00000.tar                 with 000000012.jpg and 000000012.json; or unpacked:
    folder/00000/000000012.jpg       or .webp, .png, .jpeg
    folder/00000/000000012.json

Boxes are ``x y x y`` (left top right bottom), shares of the image's width and height.
"""

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from pydantic import BaseModel

from xvlm.data.readers.entries import Number, checked, entry
from xvlm.data.readers.photographs import LARGEST, AllowMissing, Found, Photographs, Sample, around, record
from xvlm.data.records import Box, Expression, Phrase, Record

SOURCE = "grit"
ENDINGS = (".jpg", ".webp", ".png", ".jpeg")  # as img2dataset was asked to write

Tied = tuple[Number, Number, Number, Number, Number, Number, Number]  # start and end of the span, box, confidence


class Entry(BaseModel):
    key: str
    caption: str | None = None
    url: str = ""
    noun_chunks: list[Tied] = []
    ref_exps: list[Tied] = []


def read(
    folder: Path, split: str, *, images_at: Sequence[Path] = (), allow_missing: AllowMissing = False
) -> Iterator[Sample]:
    """Records and image bytes, as stored, in the order of the files' names.

    Noun chunks become phrases of the caption, expressions what they are. Boxes without area are left out.

    Args:
        folder: see the module's docstring for the files in it.
        split: train; the data set has no other part.
        images_at: folders that hold the photographs, instead of the usual places.
        allow_missing: leave entries out whose image could not be downloaded, and log how many; a list takes their keys.

    Raises:
        FileNotFoundError: neither tar files nor folders with entries, or an image is absent.
        ValueError: a file that does not follow the format; names the file, the member and the field.
    """
    if split != "train":
        raise ValueError(f"{folder}: split {split!r}; GRIT is one set, train")
    archives, entries = sorted(folder.glob("*.tar")), sorted(folder.glob("*/*.json"))
    if not archives and not entries:
        raise FileNotFoundError(f"{folder}: neither tar files nor folders with .json and .jpg files")
    with Photographs(folder, ".", at=images_at, allow_missing=allow_missing) as images:
        for path in entries:
            with entry():
                described = checked(Entry, str(path), path.read_bytes())
                names = [str(path.relative_to(folder).with_suffix(ending)) for ending in ENDINGS]
                if (found := images.find(f"{path.name} describes it", *names)) is not None:
                    yield _record(str(path), described, found), found.image
        for path in archives:
            with entry():
                for where, document, image in _members(path):
                    with entry():
                        described = checked(Entry, where, document)
                        name = f"{described.key}.jpg"
                        if (found := images.take(f"{path.name} describes it", name, path / name, image)) is not None:
                            yield _record(where, described, found), found.image


def _members(path: Path) -> Iterator[tuple[str, bytes, bytes | None]]:
    """Documents of an archive, and the image beside each. Members are read by name, nothing is unpacked."""
    try:
        with tarfile.open(path, "r:") as archive:
            files = {PurePosixPath(member.name): member for member in archive if member.isreg()}
            for name, member in files.items():
                if name.suffix == ".json":
                    with entry():
                        beside = (files.get(name.with_suffix(ending)) for ending in ENDINGS)
                        image = next(filter(None, beside), None)
                        yield f"{path}/{name}", _bytes(archive, member), _bytes(archive, image) if image else None
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:  # what ends a tar file
                raise ValueError(f"{path}: the tar file ends early, after {len(files)} files")
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not readable as a tar file: {error}") from None


def _bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > LARGEST:
        raise ValueError(f"{archive.name}/{member.name}: {member.size} bytes; expected an image or its description")
    file = archive.extractfile(member)
    assert file is not None  # regular files have contents
    return file.read()


def _record(where: str, said: Entry, found: Found) -> Record:
    if not said.caption:
        raise ValueError(f"{where}: caption is empty")
    chunks, expressions = (_boxes(where, said.caption, tied, found) for tied in (said.noun_chunks, said.ref_exps))
    return record(
        where,
        found,
        id=said.key,
        source=SOURCE,
        captions=[said.caption],
        phrases=[Phrase(caption=0, start=start, end=end, boxes_xyxy=boxes) for (start, end), boxes in chunks.items()],
        expressions=[
            Expression(text=said.caption[start:end], box_xyxy=around(boxes), boxes_xyxy=boxes if len(boxes) > 1 else [])
            for (start, end), boxes in expressions.items()
        ],
        credit=said.url,
    )


def _boxes(where: str, caption: str, tied: list[Tied], found: Found) -> dict[tuple[int, int], list[Box]]:
    """Boxes in pixels of each span of the caption."""
    boxes: dict[tuple[int, int], list[Box]] = {}
    for start, end, left, top, right, bottom, _ in tied:
        with entry():
            if not (0 <= start < end <= len(caption) and caption[int(start) : int(end)].strip()):
                raise ValueError(
                    f"{where}: expected a span of words of the {len(caption)} characters of the caption, found "
                    f"{start:g} to {end:g}"
                )
            w, h = found.width, found.height
            box = found.inside((left * w, top * h, right * w, bottom * h))
            if box is not None:
                boxes.setdefault((int(start), int(end)), []).append(box)
    return boxes
