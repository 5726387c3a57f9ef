"""Where each text of this family stands: small blocks inside blocks, with a token that follows each committed block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fast_dllm_v2.options import Blocks
from shared.decode.canvas import Canvas
from shared.decode.cursor import BlockCursor, Finished, first_stop, whole_blocks
from shared.policy.draft import Choice, Draft
from shared.trace import How

NOT_A_NUMBER = -1  # a token chosen from logits that are not numbers


class SmallBlocks(BlockCursor):
    """``block_length`` is the small block's; ``window`` is the length of the block around it."""

    def __init__(self, canvas: Canvas, blocks: Blocks):
        self._ends: dict[int, int] = {}  # of texts that ended with the token after a block
        self.begun: set[int] = set()  # rows whose current small block has its first token
        self.window = blocks.block_length
        super().__init__(
            canvas,
            block_length=blocks.small_block_length,
            steps=blocks.small_block_length,
            round_to_blocks=blocks.round_to_blocks,
            trim_stop_tokens=blocks.trim_stop_tokens,
        )

    def _total(self, prompt_length: int) -> int:
        """Where decoding ends: a small block's end, or with the published rounding a block's."""
        if self.round_to_blocks:
            return (prompt_length // self.window + self.canvas.max_new_tokens // self.window) * self.window
        return super()._total(prompt_length)

    def _left(self, draft: Draft, block: Tensor, stops: Tensor) -> Tensor:
        """What lies behind a stop token need not be decided."""
        before = stops.int().cumsum(-1) == 0
        return ((block == self.canvas.mask_id) & before).sum(-1)

    def begin(self, rows: Sequence[int]) -> None:
        super().begin(rows)
        for i in rows:
            self._begin_small_block(i)

    def _begin_small_block(self, i: int) -> None:
        """A small block starts afresh; part of it may be the prompt's."""
        known = len(self.canvas.rows[i].prompt) > self.blocks[i].start
        (self.begun.add if known else self.begun.discard)(i)

    def prefilled(self, i: int) -> int:
        return self.blocks[i].start // self.window * self.window

    def record(self, draft: Draft, choice: Choice, reach: Tensor | None, finite: Tensor | None) -> Tensor:
        """As `BlockCursor.record`, with a column more: is the first token of the small block known?"""
        known = ~draft.masked[:, 0] | choice.take[:, 0]
        return torch.cat([super().record(draft, choice, reach, finite), known[:, None].long()], 1)

    def finish_step(self, rows: Sequence[int], read: list[list[int]]) -> list[Finished]:
        self.begun |= {i for i, (*_, known) in zip(rows, read, strict=True) if known}
        return super().finish_step(rows, [four for *four, _ in read])

    def advance(self, rows: Sequence[int]) -> None:
        super().advance(rows)
        for i in rows:
            self._begin_small_block(i)

    def offset_of(self, i: int) -> int:
        """Where in its block the current small block of row ``i`` begins."""
        return self.blocks[i].start % self.window

    def offset(self, rows: Tensor) -> Tensor:
        """``[b]``: the same of ``rows [b]``."""
        return self.start[rows] % self.window

    def slots(self, rows: Tensor) -> Tensor:
        """``[b, small]``: indices of the current small block in its block."""
        return self.offset(rows)[:, None] + self._offsets

    def whole(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and positions, both ``[b, window]``, of the block that holds the current small block."""
        first = self.start[rows] - self.offset(rows)
        positions = first[:, None] + torch.arange(self.window, device=rows.device)
        return self.canvas.tokens[rows[:, None], positions], positions

    def write_next(self, index: Tensor, tokens: Tensor) -> None:
        """Write ``tokens [b]``, each at the start of its row's current small block, as an iteration of its own. No host read."""
        self.canvas.write_one(index, self.start[index], tokens, How.NEXT)

    def finish_next(self, rows: list[int], read: list[int]) -> list[Finished]:
        """Count the tokens that `write_next` wrote; returns the rows that end with theirs, and those whose small block is complete."""
        finished = []
        for i, token in zip(rows, read, strict=True):
            if token == NOT_A_NUMBER:
                where = self.where(i)
                raise FloatingPointError(f"{where}: the logits of the token after a block hold NaN or infinity")
            self.canvas.rows[i].iterations += 1
            self.begun.add(i)
            stop = token in self.canvas.stop_ids
            last = stop or self.blocks[i].start >= self._text_end(i) - 1
            if last:
                self._ends[i] = self.blocks[i].start + 1
            if last or self.block_length == 1:
                finished.append(Finished(i, last, 0, stop))
        return finished

    def _text_end(self, i: int) -> int:
        if self.round_to_blocks:
            return self.blocks[i].total + 1
        return len(self.canvas.rows[i].prompt) + self.canvas.max_new_tokens

    def _known(self, ids: list[int]) -> list[int]:
        """``ids`` up to the first that was never decided."""
        return ids[: ids.index(self.canvas.mask_id)] if self.canvas.mask_id in ids else ids

    def new_tokens(self, i: int) -> list[int]:
        start = self.blocks[i].start
        first = max(start, len(self.canvas.rows[i].prompt))
        end = min(start + self.block_length, self._text_end(i))
        return self._known(self.canvas.tokens[i, first : max(first, end)].tolist())

    def end(self, i: int) -> int:
        block, length = self.blocks[i], len(self.canvas.rows[i].prompt)
        undecided = length if block.start >= block.total else block.start + self.block_length
        return self._ends.pop(i, undecided)

    def returned(self, i: int, ids: list[int], end: int) -> list[int]:
        """Up to a stop token, or with it unless ``trim_stop_tokens``."""
        tokens = self._known(ids[len(self.canvas.rows[i].prompt) : end])
        tokens = tokens if self.round_to_blocks else tokens[: self.canvas.max_new_tokens]
        return tokens[: first_stop(tokens, self.canvas.stop_ids) + (not self.trim_stop_tokens)]


def furthest(prompt_lengths: Sequence[int], blocks: Blocks) -> int:
    """Positions that the longest text may touch: whole blocks, the token after the last, and the small block that token begins."""
    return whole_blocks(max(prompt_lengths) + blocks.max_new_tokens, blocks.block_length) + blocks.block_length
