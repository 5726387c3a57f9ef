"""The forwards of D2F that a benchmark times: passes over one to three blocks, and verifies of one."""

from __future__ import annotations

from functools import partial

import torch

from d2f.decoding import CAPTURED, pass_kinds
from shared.network import masks
from shared.network.timed import Forward

two_copy_kinds = partial(pass_kinds, causal_verifier=False)
causal_kinds = partial(pass_kinds, causal_verifier=True)


def _passes(length: int, device: torch.device) -> list[Forward]:
    sizes = [length * n for n in range(1, CAPTURED + 1)]
    names = ["draft", *(f"draft of {n} blocks" for n in range(2, CAPTURED + 1))]
    return [
        Forward(name, size, masks.block_causal(size, length, device), range(size))
        for name, size in zip(names, sizes, strict=True)
    ]


def two_copy_passes(length: int, device: torch.device) -> list[Forward]:
    """Of LLaDA, whose verify has a mask query for each token."""
    positions = [*range(length), *range(length)]
    mask, queries = masks.two_copy_verify(length, device), range(length, 2 * length)
    return [*_passes(length, device), Forward("verify", 2 * length, mask, queries, positions=positions)]


def causal_passes(length: int, device: torch.device) -> list[Forward]:
    """Of Dream, whose verify is a causal forward."""
    return [
        *_passes(length, device),
        Forward("verify", length, masks.token_causal(length, device), [*range(length), 0]),
    ]
