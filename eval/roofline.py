"""What a machine can do, measured, and the least time a forward can take on it.

The floor of a forward is the larger of two times: its weights and cached keys and values over the measured read
bandwidth, its operations over the measured matrix rate. On a CPU the same two are measured; they bound less tightly
there, because small weights stay in its caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from shared.network.sizes import expert_layers, sizes_of
from shared.output import Work
from shared.trace import Spent

# Memory bandwidth of the datasheets, in TB/s, by the name that CUDA gives the device.
DATASHEET = {
    "NVIDIA H100 80GB HBM3": 3.35,  # SXM
    "NVIDIA H100 PCIe": 2.0,
    "NVIDIA H200": 4.8,
    "NVIDIA A100-SXM4-80GB": 2.039,
    "NVIDIA A100-SXM4-40GB": 1.555,
    "NVIDIA A100-PCIE-40GB": 1.555,
    "NVIDIA L40S": 0.864,
    "NVIDIA GeForce RTX 4090": 1.008,
    "NVIDIA B200": 8.0,
}


def timed(call: Callable[[], object], device: torch.device, *, repeat: int = 20, warmup: int = 3) -> float:
    """Median seconds of ``call``: device events on a GPU, wall clock on a CPU."""
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(repeat):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
    return median(seconds)


@dataclass(frozen=True)
class Machine:
    """``read`` in bytes a second, ``rate`` in operations a second of the model's dtype."""

    name: str
    read: float
    rate: float

    def floor(self, work: Work) -> float:
        """The seconds that ``work`` takes at the least."""
        return work.floor(self.read, self.rate)

    def to_json(self) -> dict:
        return {"name": self.name, "read_bytes_per_second": self.read, "operations_per_second": self.rate}

    @classmethod
    def from_json(cls, found: dict) -> Machine:
        return cls(found["name"], found["read_bytes_per_second"], found["operations_per_second"])

    def of_datasheet(self, bytes_per_second: float) -> float | None:
        """That share of the bandwidth in the device's datasheet; None where it is not known, as of a CPU."""
        return bytes_per_second / (1e12 * DATASHEET[self.name]) if self.name in DATASHEET else None

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Machine:
        """Read bandwidth by reductions over a buffer larger than any cache, matrix rate by one large random product."""
        on_gpu = device.type == "cuda"
        size = (4 << 30) if on_gpu else (256 << 20)
        buffer = torch.randn(size // 4, device=device)
        wide = buffer.view(-1, 16384)
        vector = torch.randn(16384, device=device)
        reads = [lambda: buffer.sum(), lambda: buffer.amax(), lambda: wide @ vector]
        read = size / min(timed(r, device, repeat=10) for r in reads)
        n = 8192 if on_gpu else 1024
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rate = 2 * n**3 / timed(lambda: a @ b, device, repeat=10)
        name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
        return cls(name, read, rate)


@dataclass(frozen=True)
class Touched:
    """What a forward asks of its experts, over all layers: how many run, and for how many (token, expert) pairs."""

    experts: float = 0.0
    pairs: float = 0.0


def touched_experts(model, forwards: list[Callable[[], Tensor]]) -> Touched:
    """Counted by the routers of the plain network, mean over ``forwards``."""
    chosen: list[Tensor] = []
    keep = lambda _module, _inputs, out: chosen.append(out[0])  # noqa: E731
    hooks = [layer.gate.register_forward_hook(keep) for layer in expert_layers(model)]
    for forward in forwards if hooks else []:
        forward()
    for hook in hooks:
        hook.remove()
    experts, pairs = sum(int(c.unique().numel()) for c in chosen), sum(c.numel() for c in chosen)
    return Touched(experts / len(forwards), pairs / len(forwards))


def forward_work(
    model,
    *,
    entries: int,
    tokens: int,
    logits: int,
    context: int,
    causal: bool = False,
    touched: Touched | None = None,
    rows: int | None = None,
) -> Work:
    """A decoder's forward over ``entries`` of ``tokens`` each with ``context`` cached tokens; ``logits`` positions in
    all reach the head.

    ``rows``: of the cache that the entries share (default: one each); what is cached of a row is read once. ``causal``:
    about half of the local query-key pairs are masked. ``touched``: of a mixture of experts, only these are read and
    run.
    """
    sizes, touched = sizes_of(model), touched or Touched()
    pairs = entries * tokens * (context + tokens / (2 if causal else 1))
    spent = Spent(1, entries * tokens, logits, (rows or entries) * context, pairs)
    dense = replace(sizes, expert_layers=0).work(spent)  # experts are those that were measured, not those expected
    return Work(
        dense.read_bytes + touched.experts * sizes.expert * sizes.number_bytes,
        dense.operations + 2 * sizes.expert * touched.pairs,
    )
