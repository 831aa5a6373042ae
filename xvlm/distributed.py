"""The one place that talks to other processes; everything works unchanged where there is only one."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


class World(NamedTuple):
    rank: int
    size: int


def world() -> World:
    """This process's rank and the number of processes; (0, 1) outside a process group."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World(0, 1)


def lengths(n: int, device: torch.device) -> list[int]:
    """How many rows each process holds."""
    counts = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world().size)]
    dist.all_gather(counts, torch.tensor([n], dtype=torch.long, device=device))
    return [int(count) for count in counts]


class _Gather(torch.autograd.Function):
    """Equal numbers of rows of every process, concatenated; the gradient is summed over processes."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(world().size)]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(world().size)[world().rank]


def gather(rows: Shaped[Tensor, "local *rest"]) -> Shaped[Tensor, "all *rest"]:
    """Rows of all processes in order of rank, with the exact gradient: what every process's loss says about the local
    rows is summed. Under an engine that averages gradients over processes, a loss computed alike on every process then
    has the same gradient on 1 and on N of them. Processes may hold different numbers of rows.
    """
    if world().size == 1:
        return rows
    counts = lengths(len(rows), rows.device)
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
    parts = _Gather.apply(padded.contiguous()).chunk(len(counts))
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


def share_of_mean(count: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The factor that turns a sum over local rows into this process's part of the mean over all processes' rows.

    ``sum * factor``, averaged over processes as data-parallel engines do, is the global mean. ``count`` is the local
    number of rows; nothing anywhere gives 0 instead of a division by zero.
    """
    total = count.detach().clone()
    if world().size > 1:
        dist.all_reduce(total)
    return world().size / total.clamp(min=1)


def gather_objects(value: Any) -> list[Any]:
    """The same value of every process, in order of rank."""
    if world().size == 1:
        return [value]
    values: list[Any] = [None] * world().size
    dist.all_gather_object(values, value)
    return values


def wait_for_everyone() -> None:
    if world().size > 1:
        dist.barrier()


def main_first(work: Callable[[], None]) -> None:
    """Rank 0 does the work first, then the others, who find its files in place.

    What rank 0 raises ends every process: it tells the story, the others leave without a word.
    """
    error: Exception | None = None
    if world().rank == 0:
        try:
            work()
        except Exception as raised:
            error = raised
    if any(gather_objects(error is not None)):
        raise error or SystemExit(1)
    if world().rank != 0:
        work()


def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with rank 0's, in place."""
    if world().size > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


# Tensors that an engine has divided among processes (FSDP2).


def whole(tensor: Tensor) -> Tensor:
    """All of a divided tensor, gathered on every process; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """What this process keeps of a whole tensor, divided and placed as ``like`` is."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # all have the whole


def average_gradient(parameter: Tensor) -> None:
    """The mean over processes of a parameter's gradient, in place: for what the engine does not look after."""
    if world().size > 1:
        dist.all_reduce(parameter.grad)
        parameter.grad /= world().size
