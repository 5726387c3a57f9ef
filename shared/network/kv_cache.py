"""A preallocated key-value cache with one length per row.

A forward writes its keys and values just past the committed length and attends to ``[0, length)`` plus the tokens it
has just written. Only `BlockCache.commit` moves a length. So "do not store" is simply not committing, a rejected
draft is overwritten by the next write, and nothing is ever concatenated or cropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from shared.network.indices import Indices


class BlockCache:
    """Keys and values ``[layers, B, H_kv, S, D]`` and lengths ``[B]`` (on the device, mirrored on the host).

    The host mirror exists because every commit is decided on the host with known counts: reading a length never
    waits for the device.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        kv_heads: int,
        slots: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = (layers, rows, kv_heads, slots, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = torch.zeros(rows, dtype=torch.long, device=device)
        self.lengths = [0] * rows
        self.indices = Indices(self.length.device)

    @property
    def slots(self) -> int:
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def commit(self, counts: Sequence[int], rows: Sequence[int] | None = None) -> None:
        """Keep the first ``counts[i]`` of the tokens last written for ``rows[i]`` (default: every row)."""
        rows = range(len(self.lengths)) if rows is None else rows
        after = {row: self.lengths[row] + count for row, count in zip(rows, counts, strict=True)}
        for row, length in after.items():
            if not 0 <= length <= self.slots:
                raise ValueError(f"row {row} would hold {length} tokens; the cache has {self.slots} slots")
        for row, length in after.items():
            self.lengths[row] = length
        if after:
            self._sync()

    def reset(self, rows: Sequence[int]) -> None:
        """Forget everything committed for ``rows``."""
        for row in rows:
            self.lengths[row] = 0
        if rows:
            self._sync()

    def _sync(self) -> None:
        self.length.copy_(torch.tensor(self.lengths), non_blocking=True)

    def window(
        self,
        tokens: int,
        rows: Sequence[int] | None = None,
        *,
        ahead: Sequence[int] | None = None,
        offset: int | Sequence[int] = 0,
        width: int | None = None,
    ) -> Window:
        """Where one forward over ``tokens`` tokens of ``rows`` writes and what it sees. See `Window`."""
        rows = range(len(self.lengths)) if rows is None else rows
        return Window(self, tokens, rows, [0] * len(rows) if ahead is None else ahead, offset, width)


class Window:
    """One forward's place in the cache: ``b`` entries of ``tokens`` tokens each.

    Entry ``i`` belongs to row ``rows[i]`` and has the prefix ``[0, length + ahead[i])``. It writes at ``[prefix + offset, prefix + offset + tokens)``
    and attends to its prefix plus the local slots ``[prefix, prefix + width)``; ``width`` is ``offset + tokens`` unless a sub-block
    decoder keeps its whole block visible (``offset`` may then differ per entry). ``ahead`` is for two entries of one row in one forward: in every layer all keys are written before any
    query looks, so an entry with ``ahead = L`` sees the block that another entry of its row is writing at ``ahead = 0``.
    """

    def __init__(
        self,
        cache: BlockCache,
        tokens: int,
        rows: Sequence[int],
        ahead: Sequence[int],
        offset: int | Sequence[int],
        width: int | None,
    ):
        self.cache, self.tokens = cache, tokens
        offsets = [offset] * len(rows) if isinstance(offset, int) else list(offset)
        self.width = max(offsets) + tokens if width is None else width
        if self.width < max(offsets) + tokens:
            raise ValueError(f"width {self.width} does not hold {tokens} tokens at offset {max(offsets)}")
        prefixes = [cache.lengths[r] + a for r, a in zip(rows, ahead, strict=True)]
        everyone = list(rows) == list(range(len(cache.lengths)))
        self.row_index = cache.indices(rows)
        self.rows = None if everyone else self.row_index
        self._ahead, self._offsets = list(ahead), offsets
        self.plain = self.width == tokens  # what is written is all that is seen besides the prefix
        self.extent = max(prefixes) + self.width
        self.uniform = min(prefixes) == max(prefixes)
        if self.extent > cache.slots:
            raise ValueError(f"a forward needs {self.extent} cache slots, {cache.slots} are allocated")
        same_place = self.uniform and min(offsets) == max(offsets)
        self._first = prefixes[0] + offsets[0] if same_place and everyone else None
        self._mask: tuple[Tensor | None, Tensor | None] | None = None

    @cached_property
    def prefix(self) -> Tensor:
        """``[b]``: how many tokens each entry sees before its own."""
        committed = self.cache.length[self.row_index]
        return committed + self.cache.indices(self._ahead) if any(self._ahead) else committed

    @cached_property
    def offset(self) -> Tensor:
        """``[b]``: where behind its prefix each entry writes."""
        return self.cache.indices(self._offsets)

    @cached_property
    def _slots(self) -> Tensor:
        """``[b, T]``: where the tokens of this forward are written."""
        return (self.prefix + self.offset)[:, None] + torch.arange(self.tokens, device=self.prefix.device)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``[b, H_kv, T, D]`` for this layer; return all keys and values in reach, ``[b, H_kv, extent, D]``."""
        store_k, store_v = self.cache.keys[layer], self.cache.values[layer]
        if self._first is not None:
            where = slice(self._first, self._first + self.tokens)
            store_k[:, :, where], store_v[:, :, where] = keys, values
        else:
            store_k[self.row_index[:, None], :, self._slots] = keys.transpose(1, 2)
            store_v[self.row_index[:, None], :, self._slots] = values.transpose(1, 2)
        store_k, store_v = store_k[:, :, : self.extent], store_v[:, :, : self.extent]
        return (store_k, store_v) if self.rows is None else (store_k[self.rows], store_v[self.rows])

    def mask(self, local_mask: Tensor | None) -> Tensor | None:
        """The mask over everything in reach, ``[b, 1, T, extent]``; None when every query sees every key.

        ``local_mask`` is None, bool ``[T, W]`` or ``[b, T, W]``, or an additive float of those shapes (reference backend only).
        Built once per forward and reused by every layer.
        """
        if self._mask is None or self._mask[0] is not local_mask:
            self._mask = (local_mask, self._build_mask(local_mask))
        return self._mask[1]

    def _build_mask(self, local_mask: Tensor | None) -> Tensor | None:
        if local_mask is None and self.uniform:
            return None
        column = (
            torch.arange(self.extent, device=self.prefix.device) - self.prefix[:, None]
        )  # [b, extent], 0 = first local
        inside = (column >= 0) & (column < self.width)
        if local_mask is None:
            return ((column < 0) | inside)[:, None, None, :]
        local = local_mask if local_mask.dim() == 3 else local_mask[None]
        local = local.expand(len(column), -1, -1)
        at = column.clamp(0, self.width - 1)[:, None, :].expand(-1, local.shape[1], -1)
        local = local.gather(2, at)
        if local.dtype == torch.bool:
            return ((column < 0)[:, None, :] | (inside[:, None, :] & local))[:, None]
        outside = torch.where(column < 0, 0.0, float("-inf")).to(local.dtype)
        return torch.where(inside[:, None, :], local, outside[:, None, :])[:, None]
