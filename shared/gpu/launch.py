"""What the kernels of this room share: triton where it is installed, launch options, and scratch memory.

The module imports without triton; `available` says whether kernels can run. They do on a GPU, and anywhere in triton's interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import os
from functools import lru_cache

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

SMALL_BATCH_TOKENS = 32  # the tokens of a forward that take the small-batch way, see `shared.gpu.fast`
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
jit = triton.jit if triton is not None else (lambda function: function)


def available(device: torch.device | str) -> bool:
    """Whether the kernels can run on ``device``."""
    return triton is not None and (torch.device(device).type == "cuda" or _INTERPRET)


def overlapping_launch(device: torch.device | str) -> bool:
    """Whether ``device`` can start a kernel before the one ahead of it has finished (capability 9 and later)."""
    on_gpu = torch.device(device).type == "cuda" and not _INTERPRET
    return on_gpu and torch.cuda.get_device_capability(device)[0] >= 9


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a program may take."""
    if device.type != "cuda":
        return 1 << 30
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def pow2(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``n`` and ``least``."""
    return max(least, 1 << (n - 1).bit_length())


def launch_options(overlap: bool, warps: int, stages: int) -> dict:
    """Keywords of a kernel launch; ``overlap``: it may start before the one ahead has finished."""
    options = {"num_warps": warps, "num_stages": stages}
    return options | {"launch_pdl": True} if overlap else options


@jit
def prefetch_rows(matrix, rows, start, depth, COUNT: tl.constexpr):
    """Ask the L2 cache for ``COUNT`` elements from column ``start`` of some rows of ``matrix [.., depth]``; nothing waits for them."""
    line: tl.constexpr = 1024 // matrix.dtype.element_ty.primitive_bitwidth
    column = start + tl.arange(0, COUNT // line) * line
    address = (matrix + rows.to(tl.int64)[:, None] * depth + column[None, :]).to(tl.int64, bitcast=True)
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


class Workspace:
    """Scratch memory of one stream of kernels. Never share one between streams.

    ``counters`` of arrived programs, which every kernel leaves at zero, and ``squares [parts, SMALL_BATCH_TOKENS]``: sums of squares of the residual
    stream's rows, in ``square_parts`` parts that are still to be added up.
    """

    COUNTERS = 1 << 16
    PARTS = 1024

    def __init__(self, device: torch.device | str):
        self.counters = torch.zeros(self.COUNTERS, dtype=torch.int32, device=device)
        self.squares = torch.empty(self.PARTS, SMALL_BATCH_TOKENS, dtype=torch.float32, device=device)
        self.square_parts = 0
