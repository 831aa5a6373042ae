"""The one place that talks to other processes; everything works unchanged where there is only one."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


class World(NamedTuple):
    rank: int
    size: int


def world() -> World:
    """This process's rank and the number of processes; (0, 1) outside a process group.

    Where parts of a batch take turns (:class:`Turns`), each counts as a process.
    """
    processes = _processes()
    if _turn is None:
        return processes
    turns, number, _ = _turn
    return World(processes.rank * turns.count + number, processes.size * turns.count)


def _processes() -> World:
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World(0, 1)


class Turns:
    """Parts of a batch that take turns on this process, each as if it had a process to itself: gradient accumulation.

    Losses compare rows of all processes, so a part needs what the others exchange before any of them has its gradient.
    Each part therefore runs twice: without a gradient, while what it exchanges is kept (:meth:`listen`), and for its
    gradient, among everything kept (:meth:`speak`). The mean gradient over turns and processes is then the whole
    batch's. All that grows with the number of turns is what is exchanged (a feature per text) and compared. Gao et al.
    2021 (arXiv 2101.06983) cache features for the same end.

    Both runs must exchange the same things in the same order, and every process must compute the same loss from them:
    the gradients that the other turns would send back are taken to equal a turn's own. One turn needs no hearing.
    """

    def __init__(self, count: int):
        self.count = count
        self._kept: list[list[Tensor]] = [[] for _ in range(count)]
        self._everyones: dict[int, tuple[Tensor, int]] = {}  # an exchange's rows, and where this process's begin
        self._asked = 0

    @contextmanager
    def listen(self, turn: int) -> Iterator[None]:
        with _taking(self, turn, speaking=False), torch.no_grad():
            yield

    @contextmanager
    def speak(self, turn: int) -> Iterator[None]:
        self._asked = 0
        with _taking(self, turn, speaking=True):
            yield

    def keep(self, turn: int, rows: Tensor) -> None:
        self._kept[turn].append(rows.detach())

    def everyones(self, turn: int, rows: Tensor) -> tuple[Tensor, int]:
        """The rows of all turns and processes that belong to the exchange at hand, and where this turn's begin."""
        mine, number = [turn[self._asked] for turn in self._kept], self._asked
        self._asked += 1
        if mine[turn].shape != rows.shape:
            raise RuntimeError(f"turn {turn} exchanged {tuple(mine[turn].shape)} before, and {tuple(rows.shape)} now")
        if number not in self._everyones:
            self._everyones[number] = _everyones(torch.cat(mine))
        everything, start = self._everyones[number]
        return everything, start + sum(len(part) for part in mine[:turn])


_turn: tuple[Turns, int, bool] | None = None  # whose turn it is, and whether it speaks


@contextmanager
def _taking(turns: Turns, number: int, *, speaking: bool) -> Iterator[None]:
    global _turn
    _turn = (turns, number, speaking) if turns.count > 1 else None
    try:
        yield
    finally:
        _turn = None


def _everyones(rows: Tensor) -> tuple[Tensor, int]:
    """Rows of all processes in order of rank, and where this one's begin; with the exact gradient."""
    rank, size = _processes()
    if size == 1:
        return rows, 0
    counts = _lengths(rows)
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
    parts = _Gather.apply(padded.contiguous()).chunk(size)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]), sum(counts[:rank])


def _lengths(rows: Tensor) -> list[int]:
    """How many rows each process holds."""
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(_processes().size)]
    dist.all_gather(counts, torch.tensor([len(rows)], dtype=torch.long, device=rows.device))
    return [int(count) for count in counts]


class _Gather(torch.autograd.Function):
    """Equal numbers of rows of every process, concatenated; the gradient is summed over processes."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(_processes().size)]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        rank, size = _processes()
        return gradient.chunk(size)[rank]


class _Among(torch.autograd.Function):
    """Everyone's rows with this turn's own in their place; the others are taken to send back the same gradient."""

    @staticmethod
    def forward(ctx, rows: Tensor, everything: Tensor, start: int) -> Tensor:
        ctx.start, ctx.rows, ctx.senders = start, len(rows), world().size
        return torch.cat([everything[:start], rows, everything[start + len(rows) :]])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.senders * gradient[ctx.start : ctx.start + ctx.rows], None, None


def gather(rows: Shaped[Tensor, "local *rest"]) -> Shaped[Tensor, "all *rest"]:
    """Rows of all processes in order of rank, with the exact gradient: what every process's loss says about the local
    rows is summed. Under an engine that averages gradients over processes, a loss computed alike on every process then
    has the same gradient on 1 and on N of them. Processes may hold different numbers of rows.
    """
    if _turn is not None:
        turns, number, speaking = _turn
        if speaking:
            return _Among.apply(rows, *turns.everyones(number, rows))
        turns.keep(number, rows)
        return rows
    return _everyones(rows)[0]


def share_of_mean(count: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The factor that turns a sum over local rows into this process's part of the mean over all processes' rows.

    ``sum * factor``, averaged over processes as data-parallel engines do, is the global mean. ``count`` is the local
    number of rows; nothing anywhere gives 0 instead of a division by zero.
    """
    total = count.detach().clone()
    if _turn is not None:
        total = gather(total[None]).sum()
    elif world().size > 1:
        dist.all_reduce(total)
    return world().size / total.clamp(min=1)


def anywhere(so: Bool[Tensor, ""]) -> bool:
    """Whether something is so on any process."""
    if _processes().size == 1:
        return bool(so)
    count = so.float()
    dist.all_reduce(count)
    return bool(count)


def gather_objects(value: Any) -> list[Any]:
    """The same value of every process, in order of rank."""
    if _processes().size == 1:
        return [value]
    values: list[Any] = [None] * _processes().size
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
