"""How many samples a core reads, decodes and augments, beside the same images read the plain way, in one run.

The plain way is what people write: Pillow decodes the whole image, torchvision crops, flips, resizes and makes floats,
one image at a time. It crops, flips and colours as the configuration says, and leaves the texts out, which ours
tokenises and masks as well.
"""

import cProfile
import dataclasses
import inspect
import io
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from xvlm.bench import measure
from xvlm.data import randaugment
from xvlm.data.images import READABLE, decode_small, open_image, rgb
from xvlm.data.mentions import mentions
from xvlm.data.pixels import operated
from xvlm.data.processor import Processor
from xvlm.data.records import Record, Region
from xvlm.data.shards import Shards
from xvlm.data.stream_config import Grain, StreamConfig
from xvlm.data.streams import UnusableData, loader
from xvlm.data.transforms import augment, choose_crop
from xvlm.data.words import WordMasking, mask_words
from xvlm.data.writing import write_shards
from xvlm.types import Batch

WAYS = ("plain", "exact", "fast")
PARTS = ("read", "decode", "augment", "words", "batch")


@dataclass(frozen=True)
class Reading:
    """One kind of stream. Seconds are medians over the repeats, of reading ``images`` once."""

    grain: Grain
    images: int
    texts: int
    skipped: int  # records that this kind of stream cannot use
    seconds: dict[str, float]  # the plain way, and ours with `augment.pixels` exact and fast
    shares: dict[str, dict[str, float]]  # of our time, for exact and fast: what it goes into


@dataclass(frozen=True)
class Result:
    source: str
    originals: str | None  # what the plain way reads instead
    mean_size: tuple[float, float]  # width, height
    mean_bytes: float
    size: tuple[int, int]  # height, width
    clock: str
    repeats: int
    readings: list[Reading]

    def json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """Tables in Markdown, and what they are to be read against."""
        width, height = self.mean_size
        lines = [
            f"{self.source}: images of {width:.0f}x{height:.0f} pixels and {self.mean_bytes / 1e3:.0f} kB on average, "
            f"to {self.size[1]}x{self.size[0]}",
            f"one core, {self.clock} time; medians of {self.repeats}"
            + (f"; the plain way reads {self.originals}" if self.originals else ""),
            "",
            "| samples/s | images, texts | plain | ours, exact | ours, fast |",
            "| --- | --- | --- | --- | --- |",
        ]
        for one in self.readings:
            rates = [one.images / one.seconds[way] for way in WAYS]
            ratios = "".join(f" | {rate:,.0f} ({rate / rates[0]:.2f} x)" for rate in rates[1:])
            lines.append(f"| {one.grain} | {one.images}, {one.texts} | {rates[0]:,.0f}{ratios} |")
        lines += ["", f"| of our time | {' | '.join(PARTS)} |", "| --- |" + " --- |" * len(PARTS)]
        for one in self.readings:
            for way, shares in one.shares.items():
                lines.append(f"| {one.grain}, {way} | " + " | ".join(f"{shares[part]:.0%}" for part in PARTS) + " |")
        skipped = [f"{one.skipped} as {one.grain}" for one in self.readings if one.skipped]
        return lines + (["", f"records that cannot be used: {', '.join(skipped)}"] if skipped else [])


def bench_data(
    folder: Path | None,
    processor: Processor,
    *,
    images: int,
    batch: int,
    repeats: int,
    clock: str = "wall",
    made: tuple[int, int] = (640, 480),
    originals: Path | None = None,
) -> Result:
    """Measure reading a packed folder, or photographs made here, at the processor's size.

    Args:
        folder: None makes JPEGs of ``made`` size: width, height.
        originals: the same records packed with larger images (without ``--max-side``), which the plain way reads.
        images: how many are read, about: whole batches, of what the folder has.
        batch: images of a batch.

    Raises:
        ValueError: an unknown clock, a folder with no record that any stream can use, or one that is not among the
            originals.
        FileNotFoundError: a folder is not packed.
    """
    if clock not in ("wall", "cpu"):
        raise ValueError(f"clock {clock!r}; expected wall or cpu")
    with tempfile.TemporaryDirectory() as temporary:
        if folder is None:
            write_shards((photograph(i, made) for i in range(images)), Path(temporary), progress=False)
        shards = Shards(folder or temporary)
        plain = Shards(originals) if originals else shards
        batch = min(batch, len(shards))
        batches = min(images, len(shards)) // batch
        grains: tuple[Grain, ...] = ("caption", "region")
        readings = [_measure(shards, plain, grain, processor, batches, batch, repeats, clock) for grain in grains]
        if not any(one.images for one in readings):
            raise ValueError(f"{folder}: no record has a caption or a box that can be used")
        some = [shards.read(i) for i in range(min(images, len(shards)))]
    return Result(
        source=str(folder or f"{images} photographs made here"),
        originals=str(originals) if originals else None,
        mean_size=tuple(np.mean([(record.width, record.height) for record, _ in some], 0).tolist()),
        mean_bytes=float(np.mean([len(data) for _, data in some])),
        size=processor.config.image_size,
        clock=clock,
        repeats=repeats,
        readings=[one for one in readings if one.images],
    )


def _measure(
    shards: Shards,
    originals: Shards,
    grain: Grain,
    processor: Processor,
    batches: int,
    images: int,
    repeats: int,
    clock: str,
) -> Reading:
    def ours(pixels: str) -> Callable[[], list[Batch]]:
        config = StreamConfig(
            shards=[shards.folder],
            grain=grain,
            images=images,
            augment={"pixels": pixels},
            workers=0,
            max_skipped_share=1.0,
        )
        stream = loader(config, processor, WordMasking(), seed=0, start=0)  # opens the folder, as a run does once
        return lambda: list(islice(stream, batches))

    try:
        read = ours("exact")()
    except UnusableData:
        return Reading(grain, 0, 0, len(shards), {}, {})
    names = [name for batch in read for name in batch.ids]
    try:
        seen = [originals.find(name) for name in names]
    except KeyError as error:
        raise ValueError(f"{originals.folder}: there is no record {error}, which {shards.folder} has") from None
    config = StreamConfig(shards=[shards.folder], grain=grain, images=images)

    def plain() -> Callable[[], list[Tensor]]:
        rng = Random(0)
        return lambda: [
            torch.stack(
                [read_plainly(*originals.read(i), config, processor, rng) for i in seen[first : first + images]]
            )
            for first in range(0, len(seen), images)
        ]

    ways: dict[str, Callable[[], Callable]] = {
        "plain": plain,
        "exact": partial(ours, "exact"),
        "fast": partial(ours, "fast"),
    }
    now = measure.stopwatch(torch.device("cpu"), clock)
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, prepared in ways.items():
            work, begun = prepared(), now()
            work()
            taken[way].append(now() - begun)
    return Reading(
        grain,
        images=len(seen),
        texts=sum(len(batch.texts.ids) for batch in read),
        skipped=sum(len(batch.skipped) for batch in read),
        seconds={way: statistics.median(times) for way, times in taken.items()},
        shares={way: shares(ways[way](), now) for way in ("exact", "fast")},
    )


def read_plainly(
    record: Record, data: bytes, config: StreamConfig, processor: Processor, rng: Random
) -> Float[Tensor, "3 height width"]:
    """One image the plain way, augmented as a stream of this configuration does it."""
    image = Image.open(io.BytesIO(data), formats=READABLE).convert("RGB")
    parts = mentions(record, config.kinds, config.attributes, rng) if config.grain == "region" else []
    box_xyxy = rng.choice(parts)[-1] if parts else None
    left, top, right, bottom = choose_crop(image.size, box_xyxy, config.augment, rng)
    mode = tv.InterpolationMode(processor.config.interpolation)
    image = tv.resized_crop(image, top, left, bottom - top, right - left, list(processor.config.image_size), mode)
    if rng.random() < config.augment.hflip:
        image = tv.horizontal_flip(image)
    image = operated(image, randaugment.draw(config.augment.randaugment, rng))
    pixels = tv.to_dtype(tv.pil_to_tensor(image), torch.float32, scale=True)
    return tv.normalize(pixels, list(processor.config.mean), list(processor.config.std))


def shares(work: Callable[[], Any], now: Callable[[], float]) -> dict[str, float]:
    """What the time of reading batches goes into, by a profile of Python functions: ``PARTS``, which add up to 1."""
    profile = cProfile.Profile(now, builtins=False)
    profile.runcall(work)
    entries = profile.getstats()

    def spent(*functions: Callable) -> float:
        codes = [inspect.unwrap(function).__code__ for function in functions]
        return sum((entry.totaltime for entry in entries if entry.code in codes), 0.0)

    decoding = spent(decode_small) or spent(rgb)
    parts = {
        "read": spent(Shards.read),
        "decode": spent(open_image) + decoding,
        "augment": spent(augment) - decoding,  # it decodes once it knows what it needs
        "words": spent(Processor.encode, mask_words),
    }
    total = sum(entry.inlinetime for entry in entries)
    parts["batch"] = total - sum(parts.values())
    return {part: seconds / total for part, seconds in parts.items()}


def photograph(i: int, size: tuple[int, int]) -> tuple[Record, bytes]:
    """Soft shapes under the grain of a sensor, with a caption and three boxes; ``size`` is width, height."""
    random = np.random.default_rng(i)
    width, height = size
    shapes = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size)
    grain = random.normal(0, 6, (height, width, 1))
    file = io.BytesIO()
    Image.fromarray((shapes + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    corners = random.integers(0, (width // 2, height // 2), (3, 2)).tolist()
    regions = [
        Region(box_xyxy=(x, y, x + width // 3, y + height // 3), descriptions=["the soft shape in the middle"])
        for x, y in corners
    ]
    caption = "many soft shapes of every colour beside each other"
    record = Record(id=str(i), source="made", width=width, height=height, captions=[caption], regions=regions)
    return record, file.getvalue()
