"""What a pre-training update needs in memory, and the largest batch that fits a card.

Bytes grow with the images of a batch along a straight line, which two batches give. On a GPU its allocator is asked. On
a CPU the bytes of all tensors alive are counted, with LayerNorm in float32 as GPUs have it under autocast: what a GPU's
kernels need inside, and what its allocator loses between tensors, is then left out.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xvlm.bench.measure import device_name, peak_bytes
from xvlm.bench.step import SIZES, check, make_batch
from xvlm.models import economy
from xvlm.models.xvlm import XVLM

CARDS = (12, 24, 48, 80)  # GiB
FREE = 0.1  # of a card, for kernels and what the allocator loses
TEXTS = {"caption": 1, "region": 3}  # of an image; the published region batches have 128 texts about 48 images
REGIONS = 48 / 128  # images with regions per image with a caption, in the published batches
KEPT = 16  # bytes of a parameter: weight, gradient and AdamW's two moments, in float32


@dataclass(frozen=True)
class Need:
    """Bytes of an update beside weights, gradients and moments: ``base + per_image * images``."""

    update: str  # caption, region, or joint: both at once, ``images`` being those with captions
    checkpointed: bool
    base: float
    per_image: float


@dataclass(frozen=True)
class Memory:
    size: str
    precision: str
    device: str
    parameters: int
    measured: bool  # by a GPU's allocator; else counted
    needs: list[Need]

    def images(self, need: Need, card: int) -> int:
        """The most images of an update on a card of so many GiB; 0 where not even the model fits."""
        room = card * 2**30 * (1 - FREE) - KEPT * self.parameters - need.base
        return max(0, int(room / need.per_image))

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"images": [{card: self.images(need, card) for card in CARDS} for need in self.needs]}

    def lines(self) -> list[str]:
        """A table in Markdown."""
        how = "measured" if self.measured else "computed from the tensors alive"
        heading = [
            f"{self.size}, {self.parameters:,} parameters, {self.precision}, {how} on {self.device}",
            f"weights, gradients and moments: {KEPT * self.parameters / 1e9:.2f} GB; {FREE:.0%} of each card left free",
            "",
            "| update | checkpointing | MB an image | and GB besides |" + "".join(f" {card} GB |" for card in CARDS),
            "| --- | --- | --- | --- |" + " --- |" * len(CARDS),
        ]
        rows = []
        for need in self.needs:
            first = f"| {need.update} | {'yes' if need.checkpointed else 'no'} "
            cost = f"| {need.per_image / 1e6:.0f} | {need.base / 1e9:.2f} |"
            rows.append(first + cost + "".join(f" {self.images(need, card)} |" for card in CARDS))
        return heading + rows


def bench_memory(
    size: str,
    make_task: Callable[[XVLM], nn.Module],
    *,
    device: str,
    precision: str,
    batches: tuple[int, int],
) -> Memory:
    """Measure or count the memory of caption, region and joint updates, with and without gradient checkpointing.

    Args:
        make_task: from the model to the module that returns losses of ``{stream: batch}``.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``fp32``, or ``bf16`` (autocast).
        batches: images of the two batches the line goes through, the smaller first.

    Raises:
        ValueError: unknown size, device or precision; a batch of less than two images, or the larger one first.
    """
    place = check(size, device, precision)
    if not 2 <= batches[0] < batches[1]:
        raise ValueError(f"batches {batches}: expected two different numbers of images, the smaller first, from 2 on")
    needs = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        task = make_task(XVLM(SIZES[size])).to(place).train()
        if checkpointed:
            economy.checkpoint_layers(task)
        for norm in [module for module in task.modules() if isinstance(module, nn.LayerNorm)]:
            norm.register_forward_pre_hook(_as_on_a_gpu)
        for parameter in task.parameters():
            # Gradients are among what is kept; those that come one after another would hide small batches.
            parameter.grad = torch.zeros_like(parameter)
        one, other = (_need(task, size, update, checkpointed, batches, place, precision) for update in TEXTS)
        together = one.per_image + REGIONS * other.per_image
        needs += [one, other, Need("joint", checkpointed, max(one.base, other.base), together)]
    parameters = sum(parameter.numel() for parameter in task.parameters())
    return Memory(size, precision, device_name(place), parameters, place.type == "cuda", needs)


def _need(
    task: nn.Module,
    size: str,
    update: str,
    checkpointed: bool,
    batches: tuple[int, int],
    device: torch.device,
    precision: str,
) -> Need:
    def peak(images: int) -> int:
        batch = make_batch(SIZES[size], images, TEXTS[update], torch.Generator().manual_seed(0)).to(device)

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                total = sum(task({update: batch}).values())
            total.backward()

        return peak_bytes(device, step)

    small, large = (peak(images) for images in batches)
    per_image = (large - small) / (batches[1] - batches[0])
    return Need(update, checkpointed, max(0.0, small - per_image * batches[0]), per_image)


def _as_on_a_gpu(_norm: nn.LayerNorm, given: tuple[Tensor]) -> tuple[Tensor]:
    """Under autocast GPUs normalise in float32, and then stay with it for a while; CPUs do not."""
    return tuple(x.float() for x in given)
