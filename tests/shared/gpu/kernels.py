"""What the tests of kernels share.

Each kernel is held to its naive twin on fresh random inputs, on a GPU or in triton's interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import pytest
import torch

from shared.gpu.launch import available, overlapping_launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
needs_kernels = pytest.mark.skipif(not available(DEVICE), reason="no CUDA device, and triton does not interpret")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
DTYPES = [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32]  # the interpreter truncates bfloat16


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Distance relative to ``want``; zero where both are all zeros."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def random_tensor(*shape: int, dtype=torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def overlaps() -> list[bool]:
    """The values of ``overlap`` that can be tried here."""
    return [False, True] if overlapping_launch(DEVICE) else [False]
