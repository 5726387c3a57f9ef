"""The rows of a decode in this family: a `Batch` of small blocks inside blocks, with a token that follows each committed block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fast_dllm_v2.options import Blocks
from shared.decode.batch import Batch, Finished, Row, whole_blocks
from shared.policy.draft import Choice, Draft
from shared.trace import How

NOT_A_NUMBER = -1  # a token chosen from logits that are not numbers


class Rows(Batch):
    """``block_length`` is the small block's; ``window`` is the length of the block around it."""

    def __init__(self, prompts: Sequence[Sequence[int]], blocks: Blocks, **common):
        self._ends: dict[int, int] = {}  # of texts that ended with the token after a block
        self.begun: set[int] = set()  # rows whose current small block has its first token
        self.window, self.rounded = blocks.block_length, blocks.round_to_blocks
        super().__init__(
            prompts,
            block_length=blocks.small_block_length,
            steps=blocks.small_block_length,
            max_new_tokens=blocks.max_new_tokens,
            mask_id=blocks.mask_id,
            stop_ids=blocks.stopping_criteria_idx,
            **common,
        )

    def _total(self, prompt_length: int) -> int:
        """Where decoding ends: a small block's end, or with the published rounding a block's."""
        if self.rounded:
            return (prompt_length // self.window + self.max_new_tokens // self.window) * self.window
        return super()._total(prompt_length)

    def _capacity(self, prompts: Sequence[Sequence[int]]) -> int:
        """Room for whole blocks, and for the token after the last."""
        furthest = max(max(self._total(len(p)), len(p)) for p in prompts) + 1
        return whole_blocks(furthest, self.window)

    def _left(self, draft: Draft, block: Tensor, stops: Tensor) -> Tensor:
        """What lies behind a stop token need not be decided."""
        before = stops.int().cumsum(-1) == 0
        return ((block == self.mask_id) & before).sum(-1)

    def _place_request(self, i: int, position: int, request: int, prompt: list[int]) -> None:
        super()._place_request(i, position, request, prompt)
        self._begin(i)

    def _begin(self, i: int) -> None:
        """A small block starts afresh; part of it may be the prompt's."""
        row = self.rows[i]
        (self.begun.add if len(row.prompt) > row.start else self.begun.discard)(i)

    def prefilled(self, i: int) -> int:
        return self.rows[i].start // self.window * self.window

    def record(self, draft: Draft, choice: Choice, reach: Tensor, finite: Tensor) -> Tensor:
        """As `Batch.record`, with a column more: is the first token of the small block known?"""
        known = ~draft.masked[:, 0] | choice.take[:, 0]
        return torch.cat([super().record(draft, choice, reach, finite), known[:, None].long()], 1)

    def finish_step(self, rows: Sequence[int], read: list[list[int]]) -> list[Finished]:
        self.begun |= {i for i, (*_, known) in zip(rows, read, strict=True) if known}
        return super().finish_step(rows, [four for *four, _ in read])

    def advance(self, rows: Sequence[int]) -> None:
        super().advance(rows)
        for i in rows:
            self._begin(i)

    def offset(self, rows: Tensor) -> Tensor:
        """``[b]``: where in its block the current small block of ``rows [b]`` begins."""
        return self.start[rows] % self.window

    def places(self, rows: Tensor) -> Tensor:
        """``[b, small]``: indices of the current small block in its block."""
        return self.offset(rows)[:, None] + self._place

    def whole(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and positions, both ``[b, window]``, of the block that holds the current small block."""
        first = self.start[rows] - self.offset(rows)
        positions = first[:, None] + torch.arange(self.window, device=rows.device)
        return self.tokens[rows[:, None], positions], positions

    def write_next(self, index: Tensor, tokens: Tensor) -> None:
        """Write ``tokens [b]``, each at the start of its row's current small block, as an iteration of its own. No host read."""
        at = (index, self.start[index])
        self.tokens[at] = tokens
        how = torch.full_like(index, int(How.NEXT))
        self.history[index, :, at[1]] = torch.stack([self.iteration[index], how, torch.zeros_like(index)], 1)
        self.iteration.index_add_(0, index, torch.ones_like(index))

    def finish_next(self, rows: list[int], read: list[int]) -> list[Finished]:
        """Count the tokens that `write_next` wrote; returns the rows that end with theirs, and those whose small block is complete."""
        finished = []
        for i, token in zip(rows, read, strict=True):
            row = self.rows[i]
            if token == NOT_A_NUMBER:
                raise FloatingPointError(f"{row.where}: the logits of the token after a block hold NaN or infinity")
            row.iterations += 1
            self.begun.add(i)
            last = token in self.stop_ids or row.start >= self._text_end(i) - 1
            if last:
                self._ends[i] = row.start + 1
            if last or self.block_length == 1:
                finished.append(Finished(i, last, 0, token in self.stop_ids))
        return finished

    def _text_end(self, i: int) -> int:
        row = self.rows[i]
        return row.total + 1 if self.rounded else len(row.prompt) + self.max_new_tokens

    def _known(self, ids: list[int], first: int, end: int) -> list[int]:
        """``ids[first:end]`` up to the first that was never decided."""
        found = ids[first:end]
        return found[: found.index(self.mask_id)] if self.mask_id in found else found

    def new_tokens(self, i: int, limit: int | None = None) -> list[int]:
        """Generated ids of the current small block of row ``i`` (a device read; for streaming). A row knows its own limit."""
        row = self.rows[i]
        first, end = max(row.start, len(row.prompt)), min(row.start + self.block_length, self._text_end(i))
        return self._known(self.tokens[i].tolist(), first, end)

    def _end(self, i: int) -> int:
        row = self.rows[i]
        undecided = len(row.prompt) if row.start >= row.total else row.start + self.block_length
        return self._ends.pop(i, undecided)

    def _returned(self, ids: list[int], row: Row, end: int, blocks: Blocks) -> list[int]:
        tokens = self._known(ids, len(row.prompt), end)
        tokens = tokens if self.rounded else tokens[: self.max_new_tokens]
        stop = next((k for k, t in enumerate(tokens) if t in self.stop_ids), len(tokens))
        return tokens[: stop + (not blocks.trim_stop_tokens)]
