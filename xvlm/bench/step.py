"""What one pre-training step costs, beside the same step written the naive way, in one run.

The naive step computes the same losses from the same weights: padded text, an image's tokens copied for each of its
texts, logits over the vocabulary for every word, and five fusion passes (right pairs, wrong images, wrong texts, hidden
words, boxes). Only ratios within a run mean anything on a machine that does other work: the two steps and a large
matrix product take turns, and every time is a median over the repeats.
"""

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xvlm.bench import measure
from xvlm.bench.naive import naive_losses
from xvlm.boxes import xyxy_to_cxcywh, xyxy_to_xywh
from xvlm.models.text import TextConfig
from xvlm.models.vision import VisionConfig
from xvlm.models.xvlm import XVLM, XVLMConfig
from xvlm.optim import OptimConfig, make_optimizer
from xvlm.prose import counted
from xvlm.types import Batch, Masked, Regions, Texts

Losses = Callable[[Batch], dict[str, Tensor]]

PADDED_TO = 40  # tokens, as the reference pads its texts
CAPTION, REGION = 12.0, 8.0  # mean tokens of a text about an image and about a region

SIZES = {
    "tiny": XVLMConfig(
        vision=VisionConfig(
            trunk="swin_tiny_patch4_window7_224",
            image_size=(128, 128),
            options={"embed_dim": 32, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 4},
        ),
        text=TextConfig(dim=128, heads=4, feed_forward=512, text_layers=2, cross_layers=2),
        embed_dim=128,
    ),
    "small": XVLMConfig(
        vision=VisionConfig(trunk="swin_tiny_patch4_window7_224"),
        text=TextConfig(dim=384, heads=6, feed_forward=1536),
    ),
    "base": XVLMConfig(),  # X-VLM's: Swin-B and BERT-base
}


@dataclass(frozen=True)
class Step:
    """One way to write the step. Times are medians in seconds and include what comes before: forward is in both."""

    forward: float
    forward_backward: float
    full: float  # clipping and the optimizer's update included
    images_per_s: float
    peak_bytes: int  # at most alive beside the weights and the optimizer's state, gradients included
    forward_flops: int
    flops: int  # forward and backward, matrix products and convolutions


@dataclass(frozen=True)
class Result:
    """Both ways, and what they are compared with. Rates are in FLOP/s, times in seconds."""

    size: str
    parameters: int
    images: int
    texts: int
    device: str
    threads: int
    precision: str
    clock: str
    repeats: int
    naive: Step
    packed: Step
    image_flops: int  # of the image encoder, forward: the same for both
    loss_difference: float  # largest, in float32 and without dropout
    gradient_difference: float  # norm of the difference over the norm, likewise
    matmul_rate: float  # of large matrix products on the same device in the same run
    peak_rate: float | None  # the device's, where known

    @property
    def floor(self) -> float:
        """Seconds that the step's FLOPs take at the measured rate of matrix products."""
        return self.packed.flops / self.matmul_rate

    @property
    def expected(self) -> float:
        """How many times faster the packed step's forward and backward would be if FLOPs were all that counts."""
        return self.naive.flops / self.packed.flops

    def mfu(self, step: Step) -> float | None:
        """Share of the device's peak that goes into necessary FLOPs: those of the packed step, whichever way."""
        return None if self.peak_rate is None else self.packed.flops / step.full / self.peak_rate

    def json(self) -> dict[str, Any]:
        """All fields, and what is derived from them."""
        derived = {"floor": self.floor, "expected": self.expected, "reached": self.naive.full / self.packed.full}
        derived |= {"mfu": self.mfu(self.packed), "mfu_naive": self.mfu(self.naive)}
        return dataclasses.asdict(self) | derived

    def lines(self) -> list[str]:
        """A table in Markdown, and what it is to be read against."""
        naive, packed = self.naive, self.packed
        texts = [step.forward_flops - self.image_flops for step in (naive, packed)]
        rows = [
            ("forward, ms", naive.forward * 1e3, packed.forward * 1e3),
            ("forward and backward, ms", naive.forward_backward * 1e3, packed.forward_backward * 1e3),
            ("full step, ms", naive.full * 1e3, packed.full * 1e3),
            ("images/s", naive.images_per_s, packed.images_per_s),
            ("peak memory beside weights and optimizer, MB", naive.peak_bytes / 1e6, packed.peak_bytes / 1e6),
            ("GFLOP, forward", naive.forward_flops / 1e9, packed.forward_flops / 1e9),
            ("GFLOP, forward without the image encoder", texts[0] / 1e9, texts[1] / 1e9),
            ("GFLOP, forward and backward", naive.flops / 1e9, packed.flops / 1e9),
        ]
        threads = f"{counted(self.threads, 'thread')}, {self.clock} time"
        batch = f"{counted(self.images, 'image')}, {counted(self.texts, 'text')}"
        heading = [
            f"{self.size}, {self.parameters:,} parameters; {batch}",
            f"{self.device}, {threads}, {self.precision}; medians of {self.repeats}",
            "",
            "| | naive | packed | ratio |",
            "| --- | --- | --- | --- |",
        ]
        table = [f"| {name} | {a:,.4g} | {b:,.4g} | {max(a, b) / min(a, b):.2f} |" for name, a, b in rows]
        if self.peak_rate is not None:
            mfu = [f"{self.mfu(step):.1%}" for step in (naive, packed)]
            table.append(f"| MFU, of {self.peak_rate / 1e12:.0f} TFLOP/s | {mfu[0]} | {mfu[1]} | |")
        ratio = naive.forward_backward / packed.forward_backward
        return [
            *heading,
            *table,
            "",
            f"same losses to {self.loss_difference:.0e}, same gradients to {self.gradient_difference:.0e} (float32)",
            f"forward and backward: {self.expected:.2f} times faster expected from FLOPs, {ratio:.2f} reached",
            f"floor: {packed.flops / 1e9:,.4g} GFLOP at {self.matmul_rate / 1e9:,.4g} GFLOP/s (large matrix products "
            f"in this run) take {self.floor * 1e3:,.4g} ms",
            f"of the floor: {self.floor / packed.forward_backward:.1%} forward and backward, "
            f"{self.floor / packed.full:.1%} full step; the naive step {self.floor / naive.full:.1%}",
        ]


def bench_step(
    size: str,
    make_losses: Callable[[XVLM], Losses],
    *,
    images: int,
    texts_per_image: int,
    device: str,
    precision: str,
    repeats: int,
    clock: str = "wall",
    peak_tflops: float | None = None,
) -> Result:
    """Measure a pre-training step of a model of a named size with fresh weights, on noise.

    Args:
        make_losses: from the model to its losses of a batch: the packed way, compared with
            :func:`xvlm.bench.naive.naive_losses`.
        texts_per_image: the first is about the whole image, the others about regions.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``fp32``, or ``bf16`` (autocast).
        clock: ``wall``; ``cpu`` counts this process's processor time, for a CPU that does other work; one thread only.
        peak_tflops: the device's peak, for MFU; from :data:`xvlm.bench.measure.PEAK_TFLOPS` if not given (bf16 on a
            known GPU).

    Raises:
        ValueError: unknown size, device, precision or clock; fewer than two texts; several threads by the cpu clock.
    """
    place = check(size, device, precision)
    check_timing(device, clock, images * texts_per_image)
    torch.manual_seed(0)
    config = SIZES[size]
    model = XVLM(config).to(place)
    batch = make_batch(config, images, texts_per_image, torch.Generator().manual_seed(0)).to(place)
    ways: dict[str, Losses] = {"naive": lambda batch: naive_losses(model, batch), "packed": make_losses(model)}
    # At rate 0 the update does all its work and the weights stay: every repeat of both ways sees the same ones.
    optimizer = make_optimizer(model, OptimConfig(lr=0.0))

    model.eval()
    with torch.no_grad():
        image_flops = measure.flops(lambda: model.encode_image(batch.images, batch.regions))
    counted, loss_difference, gradient_difference = _compare(model, ways, batch)
    model.train()
    seconds = measure.stopwatch(place, clock)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def step(way: Losses) -> tuple[float, float, float]:
        torch.manual_seed(0)  # the same negatives each time
        times = [seconds()]
        with torch.autocast(place.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            total = sum(way(batch).values())
        times.append(seconds())
        total.backward()
        times.append(seconds())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(seconds())
        return times[1] - times[0], times[2] - times[0], times[3] - times[0]

    # These first steps also warm up: the optimizer's state appears in them, and kernels are chosen.
    product = measure.large_product(place, dtype)
    product()
    for way in ways.values():
        step(way)
    memory = {name: measure.peak_bytes(place, lambda way=way: step(way)) for name, way in ways.items()}
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    rates = []
    for _ in range(repeats):
        for name, way in ways.items():
            taken[name].append(step(way))
            begun = seconds()
            flops = product()
            rates.append(flops / (seconds() - begun))
    measured = {}
    for name in ways:
        forward, forward_backward, full = (statistics.median(column) for column in zip(*taken[name], strict=True))
        measured[name] = Step(forward, forward_backward, full, images / full, memory[name], *counted[name])
    if peak_tflops is None and precision == "bf16":
        peak_tflops = measure.known_peak(measure.device_name(place))
    return Result(
        size=size,
        parameters=sum(p.numel() for p in model.parameters()),
        images=images,
        texts=images * texts_per_image,
        device=measure.device_name(place),
        threads=torch.get_num_threads(),
        precision=precision,
        clock=clock,
        repeats=repeats,
        **measured,
        image_flops=image_flops,
        loss_difference=loss_difference,
        gradient_difference=gradient_difference,
        matmul_rate=statistics.median(rates),
        peak_rate=None if peak_tflops is None else peak_tflops * 1e12,
    )


class _Counted(NamedTuple):
    flops: tuple[int, int]  # forward; forward and backward
    losses: dict[str, float]
    gradient: Float[Tensor, "number"]


def _count(model: nn.Module, way: Losses, batch: Batch) -> _Counted:
    """FLOPs, losses and gradients in float32 and without dropout (the model is in ``eval`` mode)."""
    torch.manual_seed(0)
    named: dict[str, Tensor] = {}
    forward = measure.flops(lambda: named.update(way(batch)))
    backward = measure.flops(lambda: sum(named.values()).backward())
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
    model.zero_grad()
    return _Counted((forward, forward + backward), {name: loss.item() for name, loss in named.items()}, gradient)


def _compare(
    model: nn.Module, ways: dict[str, Losses], batch: Batch
) -> tuple[dict[str, tuple[int, int]], float, float]:
    """FLOPs of each way, the largest difference of their losses, and the relative one of their gradients."""
    counted = {name: _count(model, way, batch) for name, way in ways.items()}
    naive, packed = counted["naive"], counted["packed"]
    of_losses = max(abs(naive.losses[name] - packed.losses[name]) for name in naive.losses | packed.losses)
    of_gradients = float((naive.gradient - packed.gradient).norm() / naive.gradient.norm())
    return {name: each.flops for name, each in counted.items()}, of_losses, of_gradients


def make_batch(config: XVLMConfig, images: int, texts_per_image: int, generator: torch.Generator) -> Batch:
    """Noise of the usual shape: texts as long as real ones are, a quarter of their words hidden, boxes of a quarter of
    the image. The first text of each image is about all of it."""
    count, text = images * texts_per_image, config.text
    height, width = config.vision.image_size
    whole = torch.arange(count) % texts_per_image == 0
    padded_to = min(PADDED_TO, text.max_positions - text.position_offset)
    mean = torch.where(whole, CAPTION, REGION)
    lengths = torch.normal(mean, mean / 4, generator=generator).round().long().clamp(4, padded_to)
    slot = torch.arange(padded_to)
    mask = slot < lengths[:, None]
    ids = torch.randint(5, text.vocab_size, mask.shape, generator=generator) * mask
    # Real words stand between the first token and the last; a random quarter of them, at least one, is hidden.
    chance = torch.rand(mask.shape, generator=generator).masked_fill((slot == 0) | (slot >= lengths[:, None] - 1), 2.0)
    hidden = chance.argsort(1).argsort(1) < ((lengths - 2) / 4).round().clamp(min=1)[:, None]
    corner = torch.rand(count, 2, generator=generator) / 2
    xyxy = torch.cat([corner, corner + 0.5], 1)
    xyxy = torch.where(whole[:, None], torch.tensor([0.0, 0.0, 1.0, 1.0]), xyxy)
    return Batch(
        torch.randn(images, 3, height, width, generator=generator),
        Texts(ids, mask),
        Regions(
            torch.arange(images).repeat_interleave(texts_per_image),
            xyxy_to_cxcywh(xyxy),
            xyxy_to_xywh(xyxy) * torch.tensor([width, height] * 2),
            whole,
        ),
        Masked(torch.where(hidden, 4, ids), hidden),
        ids=tuple(str(i) for i in range(images)),
    )


def check(size: str, device: str, precision: str) -> torch.device:
    """The device, where all three are known.

    Raises:
        ValueError: what is not, with those that are.
    """
    for name, value, known in (
        ("size", size, tuple(SIZES)),
        ("precision", precision, ("fp32", "bf16")),
        ("device", device.partition(":")[0], ("cpu", "cuda")),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r} is none of {', '.join(known)}")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: no GPU that torch can use")
    return torch.device(device)


def check_timing(device: str, clock: str, texts: int) -> None:
    """
    Raises:
        ValueError: an unknown clock, several threads by the cpu clock, or fewer than two texts.
    """
    if clock not in ("wall", "cpu"):
        raise ValueError(f"clock {clock!r} is none of wall, cpu")
    if clock == "cpu" and (device != "cpu" or torch.get_num_threads() != 1):
        raise ValueError("the cpu clock adds up processor time: use it on the cpu with one thread")
    if texts < 2:
        raise ValueError("one text has nothing to be told apart from: take two images or texts")
