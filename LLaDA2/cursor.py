"""Where each text of this family stands: blocks whose known tokens may be replaced, and that may take steps after their last mask is gone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from llada2.options import Blocks, Editing
from shared.decode.canvas import Canvas
from shared.decode.cursor import BlockCursor, Finished, first_stop
from shared.policy.draft import Choice, Draft


class EditedBlocks(BlockCursor):
    """``in_post_step``: rows whose next step is a post step, with nothing masked. ``after_post_step``: those whose last step was one."""

    STATE: ClassVar[tuple[str, ...]] = (*BlockCursor.STATE, "posts", "changed", "_replaced")

    def __init__(self, canvas: Canvas, blocks: Blocks, editing: Editing, *, post_steps: int, skipped_uniforms: int = 0):
        """``post_steps``: the most a block may take. ``skipped_uniforms``: to discard when a post step is skipped."""
        self.post_steps, self.skipped_uniforms = post_steps, skipped_uniforms
        super().__init__(
            canvas,
            block_length=blocks.block_length,
            steps=blocks.block_length + post_steps,
            trim_stop_tokens=blocks.trim_stop_tokens,
            stopping=blocks.eos_early_stop,
        )
        self.in_post_step: set[int] = set()
        self.after_post_step: set[int] = set()
        self._starts: list[list[int]] = [[] for _ in canvas.rows]  # of the block of each iteration
        self.posts = torch.zeros_like(self.start)  # post steps of the current block
        self.changed = torch.zeros_like(self.start, dtype=torch.bool)  # did this step edit?
        self._replaced: Tensor | None = None  # [rows, old or new, iterations, L]: edited tokens, -1 elsewhere
        if editing.on:
            shape = (len(self.start), 2, canvas.iterations, self.block_length)
            self._replaced = torch.full(shape, -1, dtype=torch.int32, device=self.start.device)

    def begin(self, rows: Sequence[int]) -> None:
        super().begin(rows)
        for i in rows:
            self.posts[i], self._starts[i] = 0, []
            self.in_post_step.discard(i)
            if self._replaced is not None:
                self._replaced[i] = -1

    def edit(self, rows: Tensor, block: Tensor, masked: Tensor, tokens: Tensor, wanted: Tensor) -> Tensor:
        """Begin a step of ``rows [b]``: the ``block [b, L]`` with ``tokens`` at those ``wanted`` positions that are known and not the prompt's."""
        self.posts.index_add_(0, rows, (~masked.any(-1)).long())
        if self._replaced is None:
            return block
        generated = self.positions(rows) >= self.canvas.prompt_length[rows][:, None]
        replace = wanted & ~masked & (tokens != block) & generated
        self.changed[rows] = replace.any(-1)
        pair = torch.stack([block, tokens], 1)
        self._replaced[rows, :, self.canvas.iteration[rows]] = torch.where(replace[:, None], pair, -1).int()
        return torch.where(replace, tokens, block)

    def _left(self, draft: Draft, block: Tensor, stops: Tensor) -> Tensor:
        """Masks left, or -1 where there are none and a post step is due: not after one that changed nothing."""
        masks = super()._left(draft, block, stops)
        if self.skipped_uniforms:
            self.canvas.uniforms.take(draft.rows, 0, (masks == 0) * self.skipped_uniforms)
        if not self.post_steps:
            return masks
        due = (masks == 0) & (self.posts[draft.rows] < self.post_steps) & ~self._unchanged(draft)
        return torch.where(due, -1, masks)

    def _unchanged(self, draft: Draft) -> Tensor:
        """``[b]``: did the draft find everything known, and change nothing?"""
        return ~draft.masked.any(-1) & ~self.changed[draft.rows]

    def _verified_to(self, draft: Draft, choice: Choice, reach: Tensor) -> Tensor:
        """A draft that changed nothing has seen the whole block in its final form, as a verify may have."""
        if self.post_steps:
            reach = torch.where(self._unchanged(draft), self.block_length, reach)
        return super()._verified_to(draft, choice, reach)

    def finish_step(self, rows: Sequence[int], read: list[list[int]]) -> list[Finished]:
        for i in rows:
            self._starts[i].append(self.blocks[i].start)
        self.after_post_step = self.in_post_step.intersection(rows)
        due = {i for i, (left, *_) in zip(rows, read, strict=True) if left < 0}
        self.in_post_step = (self.in_post_step - set(rows)) | due
        return super().finish_step(rows, read)

    def advance(self, rows: Sequence[int]) -> None:
        super().advance(rows)
        self.posts[self.canvas.index(rows)] = 0

    def edits(self, i: int) -> list[tuple[int, int, int, int]]:
        if self._replaced is None:
            return []
        log, starts = self._replaced[i, :, : len(self._starts[i])], self._starts[i]
        at = (log[0] >= 0).nonzero()
        old, new = log[:, at[:, 0], at[:, 1]].tolist()
        return [(s, starts[s] + p, a, b) for (s, p), a, b in zip(at.tolist(), old, new, strict=True)]

    def returned(self, i: int, ids: list[int], end: int) -> list[int]:
        """Up to a stop token, or with it unless ``trim_stop_tokens``."""
        tokens = ids[len(self.canvas.rows[i].prompt) : end][: self.canvas.max_new_tokens]
        return tokens[: first_stop(tokens, self.canvas.stop_ids) + (not self.trim_stop_tokens)]
