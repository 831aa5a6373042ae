"""From a source people have (generated scenes, public formats) to validated shards, one folder per split."""

from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from xvlm.config import Configured
from xvlm.data import scenes
from xvlm.data.records import Record
from xvlm.data.scenes import SceneConfig
from xvlm.data.shards import Shards, write_shards

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


class CorpusConfig(Configured):
    """Where records come from and which splits are packed, each to ``<out>/<split>``."""

    reader: Reader
    out: Path
    folder: Path | None = None  # of the public data; scenes need none
    allow_missing: bool = False  # leave photographs out that are listed but absent, and say how many
    splits: dict[str, int | None]  # how many records at most; null: all
    scenes: SceneConfig = SceneConfig()


def pack(config: CorpusConfig) -> dict[str, Shards]:
    """Pack every split that is not packed yet; a split counts as packed once its index stands.

    Raises:
        FileNotFoundError, ValueError: from the reader, naming file and record.
    """
    packed = {}
    for split, limit in config.splits.items():
        folder, description = config.out / split, _description(config, split, limit)
        if (folder / "index.json").exists():
            before = Shards(folder).description
            if before != description:
                raise ValueError(
                    f"{folder} was packed from {before}, not from {description}; choose another corpus.out"
                )
        else:
            bar = tqdm(read(config, split, limit), desc=f"packing {split}", unit="record", total=limit)
            write_shards(iter(bar), folder, description=description, progress=False)
        packed[split] = Shards(folder)
    return packed


def _description(config: CorpusConfig, split: str, limit: int | None) -> dict:
    """What the shards of a split depend on, as their index keeps it."""
    description = {"reader": config.reader, "split": split, "limit": limit}
    if config.reader == "scenes":
        return description | {"version": scenes.VERSION, "scenes": config.scenes.model_dump(mode="json")}
    return description | {"folder": str(config.folder.resolve()) if config.folder else None}


def read(config: CorpusConfig, split: str, limit: int | None) -> Iterator[tuple[Record, bytes]]:
    """Records and image bytes of one split."""
    if config.reader == "scenes":
        if limit is None:
            raise ValueError(f"corpus.splits.{split}: scenes never end, so a number is needed")
        return scenes.samples(config.scenes, split, limit)
    if config.folder is None:
        raise ValueError(f"corpus.folder: the reader {config.reader} needs the folder of the data (corpus.folder=...)")
    reader = import_module(f"xvlm.data.readers.{config.reader}")
    return islice(reader.read(config.folder, split, allow_missing=config.allow_missing), limit)
