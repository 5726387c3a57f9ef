"""The rows of a decode in this family: a `Batch` whose known tokens may be replaced, and whose blocks may take steps after their last mask is gone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llada2.options import Blocks, Editing
from shared.decode.batch import Batch, Finished, Row
from shared.policy.draft import Choice, Draft


class Rows(Batch):
    """``in_post_step``: rows whose next step is a post step, with nothing masked. ``after_post_step``: those whose last step was one."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        blocks: Blocks,
        editing: Editing,
        *,
        most_posts: int,
        passed_over: int = 0,
        **common,
    ):
        """``most_posts``: post steps a block may take. ``passed_over``: random numbers of a post step that a finished block is spared."""
        self.most_posts, self.passed_over = most_posts, passed_over
        super().__init__(
            prompts,
            block_length=blocks.block_length,
            steps=blocks.block_length + self.most_posts,
            max_new_tokens=blocks.max_new_tokens,
            mask_id=blocks.mask_id,
            stop_ids=blocks.stopping_criteria_idx,
            **common,
        )
        if not blocks.eos_early_stop:
            self._stops = self._stops[:0]
        self.in_post_step: set[int] = set()
        self.after_post_step: set[int] = set()
        self._starts: list[list[int]] = [[] for _ in self.rows]  # of the block of each iteration
        self.posts = torch.zeros_like(self.start)  # post steps of the current block
        self.changed = torch.zeros_like(self.start, dtype=torch.bool)  # did this step edit?
        self._replaced: Tensor | None = None  # [rows, old or new, iterations, L]: edited tokens, -1 elsewhere
        if editing.on:
            shape = (len(self.start), 2, self.spans.shape[2], self.block_length)
            self._replaced = torch.full(shape, -1, dtype=torch.int32, device=self.start.device)

    def _place_request(self, i: int, position: int, request: int, prompt: list[int]) -> None:
        super()._place_request(i, position, request, prompt)
        self.posts[i], self._starts[i] = 0, []
        self.in_post_step.discard(i)
        if self._replaced is not None:
            self._replaced[i] = -1

    def edit(self, rows: Tensor, block: Tensor, masked: Tensor, tokens: Tensor, wanted: Tensor) -> Tensor:
        """Begin a step of ``rows [b]``: the ``block [b, L]`` with ``tokens`` at those ``wanted`` positions that are known and not the prompt's."""
        self.posts.index_add_(0, rows, (~masked.any(-1)).long())
        if self._replaced is None:
            return block
        replace = wanted & ~masked & (tokens != block) & (self.positions(rows) >= self.prompt_length[rows][:, None])
        self.changed[rows] = replace.any(-1)
        pair = torch.stack([block, tokens], 1)
        self._replaced[rows, :, self.iteration[rows]] = torch.where(replace[:, None], pair, -1).int()
        return torch.where(replace, tokens, block)

    def _left(self, draft: Draft, block: Tensor, stops: Tensor) -> Tensor:
        """Masks left, or -1 where there are none and a post step is due: not after one that changed nothing."""
        masks = super()._left(draft, block, stops)
        if self.passed_over:
            self.uniforms.take(draft.rows, 0, (masks == 0) * self.passed_over)
        if not self.most_posts:
            return masks
        due = (masks == 0) & (self.posts[draft.rows] < self.most_posts) & ~self._settled(draft)
        return torch.where(due, -1, masks)

    def _settled(self, draft: Draft) -> Tensor:
        """``[b]``: did the draft find everything known, and change nothing?"""
        return ~draft.masked.any(-1) & ~self.changed[draft.rows]

    def record(self, draft: Draft, choice: Choice, reach: Tensor, finite: Tensor) -> Tensor:
        """As `Batch.record`. A draft that changed nothing has seen the whole block in its final form, as a verify may have."""
        if self.most_posts:
            reach = torch.where(self._settled(draft), self.block_length, reach)
        return super().record(draft, choice, reach, finite)

    def finish_step(self, rows: Sequence[int], read: list[list[int]]) -> list[Finished]:
        for i in rows:
            self._starts[i].append(self.rows[i].start)
        self.after_post_step = self.in_post_step.intersection(rows)
        self.in_post_step = (self.in_post_step - set(rows)) | {
            i for i, (left, *_) in zip(rows, read, strict=True) if left < 0
        }
        return super().finish_step(rows, read)

    def advance(self, rows: Sequence[int]) -> None:
        super().advance(rows)
        self.posts[self.index(rows)] = 0

    def _edits(self, i: int) -> list[tuple[int, int, int, int]]:
        if self._replaced is None:
            return []
        log, starts = self._replaced[i, :, : len(self._starts[i])], self._starts[i]
        at = (log[0] >= 0).nonzero()
        old, new = log[:, at[:, 0], at[:, 1]].tolist()
        return [(s, starts[s] + p, a, b) for (s, p), a, b in zip(at.tolist(), old, new, strict=True)]

    def _returned(self, ids: list[int], row: Row, end: int, blocks: Blocks) -> list[int]:
        tokens = ids[len(row.prompt) : end][: self.max_new_tokens]
        stop = next((k for k, t in enumerate(tokens) if t in self.stop_ids), len(tokens))
        return tokens[: stop + (not blocks.trim_stop_tokens)]
