"""What a machine can do, measured, and the least time a forward can take on it.

The floor of a forward is the larger of two times: its weights and cached keys and values over the measured read bandwidth, its operations over the measured
matrix rate. On a CPU the same two are measured; they bound less tightly there, because small weights stay in its caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch


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

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Machine:
        """Read bandwidth by reductions over a buffer far larger than any cache, matrix rate by one large product of random numbers."""
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
class Work:
    """What a forward must move and compute."""

    read_bytes: float
    operations: float

    def floor(self, machine: Machine) -> float:
        """Seconds."""
        return max(self.read_bytes / machine.read, self.operations / machine.rate)


def dense_work(model, *, entries: int, tokens: int, logits: int, context: int, causal: bool = False) -> Work:
    """A dense decoder's forward over ``entries`` of ``tokens`` each with ``context`` cached tokens; ``logits`` positions in all reach the head.

    ``causal``: about half of the local query-key pairs are masked.
    """
    config, size = model.config, torch.empty(0, dtype=model.dtype).element_size()
    embedding = model.model.embed_tokens.weight.numel()
    head = model.lm_head.weight.numel()
    every = sum(p.numel() for p in model.parameters())
    body = every - embedding - (0 if config.tie_word_embeddings else head)
    narrow = config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    wide = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    pairs = entries * tokens * (context + tokens / (2 if causal else 1))
    read = (body + (head if logits else 0)) * size + 2 * entries * context * narrow * size
    return Work(read, 2 * body * entries * tokens + 2 * head * logits + 4 * pairs * wide)
