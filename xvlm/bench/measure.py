"""What work costs: FLOPs, bytes alive at once, seconds, and the rate that a device reaches at best."""

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

# Dense bfloat16 TFLOP/s of the makers' data sheets; the words are looked for in the device's name, in this order.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "4090": 165.0,
}


def flops(work: Callable[[], Any]) -> int:
    """Of matrix products and convolutions."""
    # Fused attention written out: not every torch knows the FLOPs of every fused kernel, and what a kernel computes
    # twice to save memory is no work that had to be done.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


class _Alive(TorchDispatchMode):
    """Bytes of the tensors made while it is active, and their peak: CPUs have no allocator that counts them."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {_storage(tensor)._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := _storage(tensor))._cdata not in given:
                given.add(storage._cdata)
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return result

    def _gone(self, count: int) -> None:
        self.bytes -= count


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def peak_bytes(device: torch.device, work: Callable[[], Any]) -> int:
    """Most bytes that tensors take while ``work`` runs, beyond those before; on CUDA, also what kernels need inside."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Alive() as alive:
        work()
    return alive.peak


def stopwatch(device: torch.device, clock: str) -> Callable[[], float]:
    """Seconds by the ``wall`` clock, once the device is done, or processor time of this process (``cpu``)."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return time.process_time if clock == "cpu" else now


def large_product(device: torch.device, dtype: torch.dtype) -> Callable[[], int]:
    """A square matrix product, large enough to run at the device's rate; returns its FLOPs."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> int:
        torch.mm(a, b, out=out)
        return 2 * n**3

    return product


def known_peak(device: str) -> float | None:
    """Dense bfloat16 TFLOP/s of a device by its name, if it is in the table."""
    words = set(device.replace("-", " ").split())
    return next((peak for name, peak in PEAK_TFLOPS.items() if set(name.split()) <= words), None)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
