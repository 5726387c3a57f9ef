"""A preallocated key-value cache with one length per row.

A forward writes its keys and values just past the committed length and attends to ``[0, length)`` plus the tokens it
has just written. Only `BlockCache.commit` moves a length. So "do not store" is simply not committing, a rejected
draft is overwritten by the next write, and nothing is ever concatenated or cropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from shared.network.indices import Indices
from shared.network.memory import check_room


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
        needed = 2 * math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
        check_room(
            f"the cache of {rows} texts of {slots} tokens",
            needed,
            device,
            "fewer texts at a time (batch_size), shorter ones",
        )
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

    def keep(self, rows: Sequence[int], branches: Sequence[int], counts: Sequence[int]) -> None:
        """Commit for ``rows[i]`` the first ``counts[i]`` tokens last written to row ``branches[i]`` behind a prefix of ``rows[i]``.

        They are copied to the row's own slots where the branch is another row. See `BlockCache.window`, ``write_rows``.
        """
        copies = [
            (row, branch, self.lengths[row] + k)
            for row, branch, count in zip(rows, branches, counts, strict=True)
            for k in range(count if branch != row else 0)
        ]
        if copies:
            into, out_of, slots = torch.tensor(copies).to(self.length.device).unbind(-1)
            for store in (self.keys, self.values):
                store[:, into, :, slots] = store[:, out_of, :, slots]
        self.commit(counts, rows)

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
        write_rows: Sequence[int] | None = None,
    ) -> Window:
        """Where one forward over ``tokens`` tokens of ``rows`` writes and what it sees. See `Window`."""
        rows = range(len(self.lengths)) if rows is None else rows
        return Window(self, tokens, rows, ahead, offset, width, write_rows)


@dataclass(frozen=True, slots=True)
class Where:
    """What a device knows of a `Window`, ``b`` entries in all: ``rows [b]`` whose prefix each reads, how many tokens ``ahead [b]`` of the committed
    ones that prefix reaches (None: no entry's does), at what ``offset [b]`` behind it each writes (None: right there), into ``write_rows [b]`` (None:
    the same rows). ``width``: local slots that are seen (0: the tokens written). A row of -1 is padding: nothing is written.
    """

    rows: Tensor
    ahead: Tensor | None = None
    offset: Tensor | None = None
    write_rows: Tensor | None = None
    width: int = 0

    def prefix(self, lengths: Tensor) -> Tensor:
        """``[b]``: how many tokens each entry sees before its own, of the committed ``lengths [rows]``."""
        committed = lengths[self.rows]
        return committed if self.ahead is None else committed + self.ahead


class Window:
    """Where one forward reads and writes, said once: ``b`` entries of ``tokens`` tokens each. ``where`` is the same for the device.

    Entry ``i`` reads the prefix ``[0, length + ahead[i])`` of row ``rows[i]``. It writes at ``[prefix + offset, prefix + offset + tokens)`` of row
    ``write_rows[i]`` (default: the same row) and sees, besides its prefix, the local slots ``[prefix, prefix + width)`` of that row. ``width`` is
    ``offset + tokens`` unless a sub-block decoder keeps its whole block visible; ``offset`` may then differ per entry.

    ``ahead`` is for two entries of one row in one forward: in every layer all keys are written before any query looks, so an entry with ``ahead = L``
    sees the block that another entry of its row is writing at ``ahead = 0``. ``write_rows`` is for branches that share a prefix: each has a row of its
    own to write to, and `BlockCache.keep` makes the tokens of one the row's own.
    """

    def __init__(
        self,
        cache: BlockCache,
        tokens: int,
        rows: Sequence[int],
        ahead: Sequence[int] | None = None,
        offset: int | Sequence[int] = 0,
        width: int | None = None,
        write_rows: Sequence[int] | None = None,
    ):
        self.cache, self.tokens, self.entries = cache, tokens, list(rows)
        offsets = [offset] * len(rows) if isinstance(offset, int) else list(offset)
        self.width = max(offsets) + tokens if width is None else width
        if self.width < max(offsets) + tokens:
            raise ValueError(f"width {self.width} does not hold {tokens} tokens at offset {max(offsets)}")
        self.plain = self.width == tokens  # what is written is all that is seen besides the prefix
        self.where = Where(
            cache.indices(rows),
            cache.indices(ahead) if ahead is not None and any(ahead) else None,
            None if self.plain else cache.indices(offsets),
            None if write_rows is None else cache.indices(write_rows),
            0 if self.plain else self.width,
        )
        self.prefixes = [cache.lengths[r] + a for r, a in zip(rows, ahead or [0] * len(rows), strict=True)]
        self.extent = max(self.prefixes) + self.width
        if self.extent > cache.slots:
            raise ValueError(f"a forward needs {self.extent} cache slots, {cache.slots} are allocated")
        self.uniform = min(self.prefixes) == max(self.prefixes)
        # Every row in order, at the same slots: a slice, which a CPU copies faster than it scatters.
        self._everyone = write_rows is None and self.entries == list(range(len(cache.lengths)))
        same_slots = self._everyone and self.uniform and min(offsets) == max(offsets)
        self._first = self.prefixes[0] + offsets[0] if same_slots else None
        self._mask: tuple[Tensor | None, Tensor | None] | None = None

    @cached_property
    def prefix(self) -> Tensor:
        """``[b]``: how many tokens each entry sees before its own."""
        return self.where.prefix(self.cache.length)

    @cached_property
    def _written(self) -> tuple[Tensor, Tensor]:
        """``rows [b, 1]`` and ``slots [b, T]`` that this forward writes to."""
        where = self.where
        first = self.prefix if where.offset is None else self.prefix + where.offset
        rows = where.rows if where.write_rows is None else where.write_rows
        return rows[:, None], first[:, None] + torch.arange(self.tokens, device=first.device)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``[b, H_kv, T, D]`` for this layer; return all keys and values in reach, ``[b, H_kv, extent, D]``."""
        stores = self.cache.keys[layer], self.cache.values[layer]
        for store, new in zip(stores, (keys, values), strict=True):
            if self._first is not None:
                store[:, :, self._first : self._first + self.tokens] = new
            else:
                rows, slots = self._written
                store[rows, :, slots] = new.transpose(1, 2)
        return tuple(self._seen(store[:, :, : self.extent]) for store in stores)

    def _seen(self, store: Tensor) -> Tensor:
        """What each entry may see of a layer's ``store [B, H_kv, extent, D]``."""
        if self._everyone:
            return store
        seen = store[self.where.rows]
        if self.where.write_rows is None:
            return seen
        before = torch.arange(self.extent, device=seen.device) < self.prefix[:, None]
        return torch.where(before[:, None, :, None], seen, store[self.where.write_rows])

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
