"""From a source people have (generated scenes, public formats) to validated shards, one folder per split."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from tqdm import tqdm

from xvlm import hub
from xvlm.config import Configured
from xvlm.data import scenes
from xvlm.data.fingerprint import fingerprint, fingerprint_beside
from xvlm.data.leaks import Guard
from xvlm.data.prepare import Preparation
from xvlm.data.readers.csv_table import splits_of
from xvlm.data.records import Record
from xvlm.data.scenes import SceneConfig
from xvlm.data.shards import INDEX, Shards, read_index, read_remarks
from xvlm.data.writing import source_digest, write_shards

# Each but the scenes is a module of xvlm.data.readers, whose docstring shows the files it expects.
Reader = Literal[
    "scenes",
    "coco",
    "visual_genome",
    "refcoco",
    "refcoco_json",
    "flickr30k_entities",
    "openimages",
    "objects365",
    "vqa",
    "nlvr2",
    "odvg",
    "grit",
    "xvlm_jsonl",
    "albef_json",
    "coco_json",
    "csv_table",
    "json_lines",
]

HELD_OUT = 10  # one image in so many, of a file that is to be trained and validated on

FINGERPRINT = "fingerprint"  # of the source, beside the index

# Readers of files that may have any name; the others know theirs by their names.
OF_FILES = ("csv_table", "coco_json", "json_lines", "xvlm_jsonl", "albef_json", "odvg")

Paths = Annotated[list[Path], BeforeValidator(lambda given: given if isinstance(given, list) else [given])]  # or one


class CorpusConfig(Configured):
    """Where records come from and which splits are packed, each to ``<out>/<split>``."""

    reader: Reader
    out: Path
    folder: Path | None = None  # of the public data; scenes need none, and files of your own bring their folder
    # Of readers of files: a split's annotations, a file or several of any name. A `val` without one takes every tenth
    # image of train, beginning with the first, and leaves it the others.
    files: dict[str, Paths] = {}
    images: Paths = []  # folders that hold the photographs, where these are not in the places that the reader knows
    allow_missing: bool = False  # leave photographs out that are listed but absent, and say which
    masks: bool = False  # of the readers coco and coco_json: keep the outlines of things too
    splits: dict[str, int | None]  # how many records at most; null: all
    scenes: SceneConfig = SceneConfig()
    max_side: Annotated[int, Field(gt=0)] | None = None  # larger images are made smaller; null: bytes stay as they are
    allow_broken: bool = False  # leave images out that cannot be decoded, and say which
    avoid: list[Path] = []  # packed evaluation sets, of whose images none may be in here
    leaks: Literal["drop", "report"] = "drop"
    workers: Annotated[int, Field(ge=0)] = 0  # processes that decode and re-encode; the result is the same

    @model_validator(mode="after")
    def masks_are_of_coco(self) -> "CorpusConfig":
        if self.masks and self.reader not in ("coco", "coco_json"):
            raise ValueError(f"masks: a choice of the readers coco and coco_json, not of {self.reader}")
        return self

    @model_validator(mode="after")
    def every_split_has_a_file(self) -> "CorpusConfig":
        if not self.files:
            return self
        if self.reader not in OF_FILES:
            raise ValueError(f"files: {self.reader} reads a folder; {', '.join(OF_FILES)} read files")
        if missing := self.splits.keys() - self.files.keys() - ({"val"} if "train" in self.files else set()):
            raise ValueError(f"files: none for {', '.join(sorted(missing))}")
        return self

    @property
    def holds_out(self) -> bool:
        """Whether validation images are taken from the training file."""
        return bool(self.files) and "val" in self.splits.keys() - self.files.keys()


def pack(config: CorpusConfig) -> dict[str, Shards]:
    """Pack every split that is not packed yet; a split counts as packed once its index stands.

    Raises:
        FileNotFoundError, ValueError: from the reader, or about an image that cannot be packed, naming file and record;
            or a split was packed from something else, or from a source that has changed since; or two splits are of one
            table that does not say which rows are of which.
    """
    guard = None
    _check_apart(config)
    for split, limit in config.splits.items():
        folder, description = config.out / split, _description(config, split, limit)
        source = _Source(config, split, limit)
        if (folder / INDEX).exists():
            _check_same(folder, source, description)
            continue
        if config.avoid and guard is None:
            guard = Guard(config.avoid, config.workers, progress=True)
        (folder / FINGERPRINT).unlink(missing_ok=True)
        before = source.fingerprint()
        write_shards(
            source,
            folder,
            prepare=Preparation(config.max_side, config.allow_broken, guard, config.leaks == "report"),
            absent=source.absent,
            workers=config.workers,
            description=description,
            progress=False,
        )
        after = source.fingerprint(source.absent)
        if after and source.fingerprint() == before:  # else it changed meanwhile, and is compared the next time
            hub.write_atomically(folder / FINGERPRINT, after)
    return {split: Shards(config.out / split) for split in config.splits}


class _Source:
    """The samples of a split, read from the beginning each time."""

    def __init__(self, config: CorpusConfig, split: str, limit: int | None):
        self.config, self.split, self.limit = config, split, limit
        self.absent: list[str] = []  # of the images, once all samples were read

    def __iter__(self) -> Iterator[tuple[Record, bytes]]:
        self.absent.clear()
        samples = read(self.config, self.split, self.limit, self.absent)
        return iter(tqdm(samples, desc=f"reading {self.split}", unit="record", total=self.limit))

    def fingerprint(self, absent: Collection[str] = ()) -> str | None:
        """Of the files as they are now; None: they are gone. The description has a digest of files that were named."""
        folder = _folder(self.config, self.split)
        folders = [each for each in (folder, *self.config.images) if each is not None]
        if not folders or not all(each.is_dir() for each in folders):
            return None
        found = []
        if self.config.files:
            beside = {folder, *(file.parent for file in _files(self.config, self.split))}
            found = [fingerprint_beside(each) for each in sorted(beside)]
        if absent or not self.config.files:
            found += [fingerprint(each, absent, leave_out=self.config.out) for each in folders]
        return "\n".join(found)


def _check_same(folder: Path, source: _Source, description: dict[str, Any]) -> None:
    """Raises ValueError where a packed folder is not what packing would give now, and says why."""
    index = read_index(folder)
    if not index.source:  # packed before these were kept, nor anything that tells whether the source changed
        description = {name: value for name, value in description.items() if not name.startswith("allow_")}
    remedy = "remove that folder to pack it anew, or choose another folder"
    if index.description != description:
        if index.description | {"file": description.get("file")} == description:
            files = ", ".join(map(str, _files(source.config, source.split)))
            raise ValueError(f"{files} changed since {folder} was packed, or another file was; {remedy}")
        different = _difference(index.description, description)
        raise ValueError(f"{folder} was packed from something else ({different}); {remedy}")
    kept = folder / FINGERPRINT
    now = source.fingerprint([remark.record for remark in read_remarks(folder) if remark.why == "absent"])
    if not index.source or now is None or (kept.exists() and kept.read_text() == now):
        return
    if source_digest(source) != index.source:
        raise ValueError(f"{folder}: the source has changed since this was packed; {remedy}")
    with suppress(OSError):  # a folder that cannot be written to is compared each time
        hub.write_atomically(kept, now)


def _check_apart(config: CorpusConfig) -> None:
    """Raises ValueError where two splits, packed now or before, are of one table without a column that parts them."""
    if config.reader != "csv_table":
        return
    read_before: dict[str, Any] = {}
    for index in sorted(config.out.glob(f"*/{INDEX}")):
        with suppress(ValueError):  # another file of that name
            read_before[index.parent.name] = read_index(index.parent).description.get("file")
    for split in filter(config.files.get, config.splits):
        digest = _digest(config, split)
        for other in read_before.keys() - {split}:
            held_out = config.holds_out and {split, other} == {"train", "val"}
            if read_before[other] == digest and not held_out and not all(map(splits_of, _files(config, split))):
                raise ValueError(
                    f"{_files(config, split)[0]}: all its rows would be {split} and {other} as well; expected a column "
                    "split, or a table for each"
                )
        read_before[split] = digest


def _digest(config: CorpusConfig, split: str) -> str | list[str]:
    """Of the files of a split."""
    digests = [hub.sha256(file) for file in _files(config, split)]
    return digests[0] if len(digests) == 1 else digests


def _description(config: CorpusConfig, split: str, limit: int | None) -> dict:
    """What the shards of a split depend on, as their index keeps it."""
    description: dict[str, Any] = {"reader": config.reader, "split": split, "limit": limit}
    if config.max_side is not None:
        description["max_side"] = config.max_side
    for name in ("masks", "allow_missing", "allow_broken"):
        if getattr(config, name):
            description[name] = True
    if config.avoid:
        avoid = {str(folder.resolve()): hub.sha256(folder / INDEX) for folder in config.avoid}
        description |= {"avoid": avoid, "leaks": config.leaks}
    if config.reader == "scenes":
        return description | {"version": scenes.VERSION, "scenes": config.scenes.model_dump(mode="json")}
    description |= {"folder": str(config.folder.resolve()) if config.folder else None}
    if config.files:
        description |= {"file": _digest(config, split), "holds_out": config.holds_out}
    if config.images:
        description["images"] = [str(folder.resolve()) for folder in config.images]
    return description


def _difference(before: dict[str, Any], now: dict[str, Any], inside: str = "") -> str:
    """What two descriptions do not have in common: the name of each, and both values."""
    told = []
    for name in before | now:
        was, becomes = before.get(name), now.get(name)
        if isinstance(was, dict) and isinstance(becomes, dict):
            told.append(_difference(was, becomes, f"{inside}{name}."))
        elif was != becomes:
            told.append(f"{inside}{name} was {was!r:.80}, is {becomes!r:.80}")
    return ", ".join(filter(None, told))


def read(
    config: CorpusConfig, split: str, limit: int | None, absent: list[str] | None = None
) -> Iterator[tuple[Record, bytes]]:
    """Records and image bytes of one split; with ``allow_missing``, ``absent`` takes the names of absent images."""
    if config.reader == "scenes":
        if limit is None:
            raise ValueError(f"corpus.splits.{split}: scenes never end, so a number is needed")
        return scenes.samples(config.scenes, split, limit)
    reader = import_module(f"xvlm.data.readers.{config.reader}")
    options: dict[str, Any] = {"allow_missing": config.allow_missing and (True if absent is None else absent)}
    options["images_at"] = config.images
    if config.masks:
        options["masks"] = True
    if config.files:
        files = _files(config, split)
        holds_out = config.holds_out and split in ("train", "val")
        samples = reader.read(_folder(config, split), "train" if holds_out else split, files=files, **options)
        if holds_out:
            samples = _held_out(samples, split, files[0])
    elif config.folder is None:
        raise ValueError(f"corpus.folder: the reader {config.reader} needs the folder of the data (corpus.folder=...)")
    else:
        samples = reader.read(config.folder, split, **options)
    return islice(samples, limit)


def _held_out(samples: Iterable[tuple[Record, bytes]], split: str, file: Path) -> Iterator[tuple[Record, bytes]]:
    """Every tenth image for ``val``, the others for ``train``."""
    number = -1
    for number, each in enumerate(samples):
        if (number % HELD_OUT == 0) == (split == "val"):
            record, image = each
            yield record.model_copy(update={"split": split}), image
    if number < 1:
        few = "no image" if number < 0 else "one image, which is held out as val"
        raise ValueError(f"{file}: there is {few}; expected two or more, or a file for val of its own")


def _folder(config: CorpusConfig, split: str) -> Path | None:
    """Where the data of a split are; files bring their folder."""
    return _files(config, split)[0].parent if config.files and config.folder is None else config.folder


def _files(config: CorpusConfig, split: str) -> list[Path]:
    """The files that a split is in.

    Raises:
        FileNotFoundError: one is not there.
    """
    files = config.files.get(split) or config.files["train"]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file, for the split {split!r}")
    return files
