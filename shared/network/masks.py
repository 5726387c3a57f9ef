"""Local attention masks: bool ``[T, W]`` (or ``[B, T, W]``), True = the query may attend to the key.

They cover only the tokens of one forward. The committed prefix in the cache is always visible, so it is
never part of a mask built here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_causal(length: int, device: torch.device | str = "cpu") -> Tensor:
    """``[length, length]``: each token sees itself and what came before (block size one)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def block_causal(length: int, block_length: int, device: torch.device | str = "cpu") -> Tensor:
    """``[length, length]``: each token sees its own block and all earlier ones. Token 0 starts a block."""
    block = torch.arange(length, device=device) // block_length
    return block[None, :] <= block[:, None]


def two_copy_verify(block_length: int, device: torch.device | str = "cpu") -> Tensor:
    """``[2L, 2L]`` mask of the verify forward over [drafted block | L mask tokens] (S2D2, "2L trick").

    Row ``i`` of the first half sees drafted tokens ``j <= i``. Row ``L + i``, a mask token standing at the same
    position, sees drafted tokens ``j < i`` and itself: its logits are those of the block-size-one model for position ``i``.
    """
    causal = token_causal(block_length, device)
    nothing = torch.zeros_like(causal)
    own = torch.eye(block_length, dtype=torch.bool, device=device)
    return torch.cat([torch.cat([causal, nothing], 1), torch.cat([causal & ~own, own], 1)], 0)


def span_verify(queries: Tensor, tokens: int) -> Tensor:
    """``[B, E + M, E + M]`` mask of a verify forward over [first E tokens of the drafted block | M mask queries].

    ``queries [B, M]`` are the in-block positions the mask tokens stand at. As in `two_copy_verify`, a drafted token sees drafted tokens up to
    itself, a query at position ``p`` sees drafted tokens ``j < p`` and itself. ``two_copy_verify(L)`` is the case ``E = M = L``.
    """
    column = torch.arange(tokens + queries.shape[1], device=queries.device)
    stands_at = torch.cat([column[:tokens].expand(len(queries), -1), queries], 1)
    earlier = (column < stands_at[:, :, None]) & (column < tokens)
    return earlier | (column == column[:, None])


def causal_until(first_masked: Tensor, block_length: int) -> Tensor:
    """``[B, L, L]``: rows before ``first_masked [B]`` are token-causal, the others see the whole block (``draft_ver``)."""
    column = torch.arange(block_length, device=first_masked.device)
    return (column <= column[:, None]) | (column >= first_masked[:, None])[:, :, None]
