"""Where each text stands. `Cursor` is what every loop needs; `BlockCursor` goes by blocks of one length, counted from position 0, one at a time.

The host keeps what it decides itself (block starts, step counts) and reads the device once a step, for `BlockCursor.finish_step`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from shared.decode.canvas import Canvas
from shared.policy.draft import Choice, Draft
from shared.policy.unmask import step_quota
from shared.trace import How, Pass


@dataclass
class Block:
    """What the host knows of a row's current block."""

    start: int  # its first position
    total: int  # positions up to the end of the last block
    step: int = 0  # iterations spent in it
    uncommitted: bool = False  # the block before it still has to be committed
    cached: bool = False  # the cache holds keys of the whole block, written by a draft


class Finished(NamedTuple):
    """A row whose block has no masks left. ``last``: the text ends with it. ``verified_to``: how many of its tokens, in their final form, this
    step's verify forward was conditioned on (0: none, or not in their final form). ``stopped``: a stop token is why it ends."""

    row: int
    last: bool
    verified_to: int
    stopped: bool = False


def whole_blocks(tokens: int, block_length: int) -> int:
    """``tokens`` rounded up to whole blocks."""
    return -(-tokens // block_length) * block_length


def most_iterations(slots: int, block_length: int, steps: int) -> int:
    """Of a text that takes ``slots`` positions, in blocks that take at most twice ``steps``."""
    return 2 * steps * (slots // block_length + 2)


class Cursor(ABC):
    """Where the texts of ``canvas`` stand. ``block_length`` is what their traces are shown by (0: no blocks)."""

    STATE: ClassVar[tuple[str, ...]] = ()
    block_length = 0

    def __init__(self, canvas: Canvas, trim_stop_tokens: bool = True):
        self.canvas, self.trim_stop_tokens = canvas, trim_stop_tokens

    @abstractmethod
    def begin(self, rows: Sequence[int]) -> None:
        """Stand before the first token of the texts that were admitted to ``rows``."""

    @abstractmethod
    def prefilled(self, i: int) -> int:
        """How many tokens of the prompt of row ``i`` are encoded before its first step."""

    @abstractmethod
    def end(self, i: int) -> int:
        """Up to where a finished text is decided."""

    def returned(self, i: int, ids: list[int], end: int) -> list[int]:
        """The tokens that the text of row ``i`` gives back, of its ``ids``, which are decided up to ``end``: up to a stop token, or with it unless
        ``trim_stop_tokens``."""
        tokens = ids[len(self.canvas.rows[i].prompt) : end][: self.canvas.max_new_tokens]
        return tokens[: first_stop(tokens, self.canvas.stop_ids) + (not self.trim_stop_tokens)]

    def edits(self, i: int) -> list[tuple[int, int, int, int]]:
        """`shared.trace.Trace.edits` of the text of row ``i``."""
        return []

    def passes(self, i: int) -> list[Pass]:
        """`shared.trace.Trace.passes` of the text of row ``i``."""
        return []


class BlockCursor(Cursor):
    """The current block of every row of ``canvas``. ``block_length`` L, ``steps`` S: see `shared.options.Blocks`, as for ``round_to_blocks`` and
    ``trim_stop_tokens``. ``stopping``: does a stop token end the text at once?"""

    STATE: ClassVar[tuple[str, ...]] = ("start", "step", "decoded", "schedule", "_stops", "_offsets")

    def __init__(
        self,
        canvas: Canvas,
        *,
        block_length: int,
        steps: int,
        round_to_blocks: bool = False,
        trim_stop_tokens: bool = True,
        stopping: bool = True,
    ):
        super().__init__(canvas, trim_stop_tokens)
        self.block_length, self.steps, self.round_to_blocks = block_length, steps, round_to_blocks
        self.blocks: dict[int, Block] = {}  # by row
        device = canvas.tokens.device
        self.start = torch.zeros_like(canvas.prompt_length)
        self.step = torch.zeros_like(self.start)  # of the current block
        self.decoded = torch.zeros_like(self.start)
        self.schedule = torch.tensor(step_quota(block_length, steps), device=device)
        self._stops = torch.tensor(canvas.stop_ids if stopping else (), dtype=torch.long, device=device)
        self._offsets = torch.arange(block_length, device=device)

    def begin(self, rows: Sequence[int]) -> None:
        for i in rows:
            length = len(self.canvas.rows[i].prompt)
            start = length // self.block_length * self.block_length
            self.blocks[i] = Block(start, self._total(length))
            self.start[i], self.step[i], self.decoded[i] = start, 0, 0

    def _total(self, prompt_length: int) -> int:
        return whole_blocks(prompt_length + self.canvas.max_new_tokens, self.block_length)

    def where(self, i: int) -> str:
        """Location, for error messages."""
        block = self.blocks[i]
        return f"request {self.canvas.rows[i].request}, block at position {block.start}, step {block.step}"

    def prefilled(self, i: int) -> int:
        """Whole blocks of the prompt."""
        return self.blocks[i].start

    @property
    def one_token_is_enough(self) -> bool:
        """Is the quota of every step a single token?"""
        return self.steps >= self.block_length

    def positions(self, rows: Tensor, back: int = 0) -> Tensor:
        """``[b, L]``: absolute positions of the current block of ``rows [b]``, or of the block ``back`` positions before it."""
        return (self.start[rows] - back)[:, None] + self._offsets

    def block(self, rows: Tensor, back: int = 0) -> Tensor:
        """``[b, L]``: ids of that block."""
        return self.canvas.tokens[rows[:, None], self.positions(rows, back)]

    def quota(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``(tokens due [b], overtime [b])`` of this step of ``rows [b]``. After the last step the schedule runs once more, in overtime."""
        step = self.step[rows]
        return self.schedule[step % self.steps], step >= self.steps

    def record(self, draft: Draft, choice: Choice, reach: Tensor | None, finite: Tensor | None) -> Tensor:
        """Write the step's choice into the canvas; returns what `finish_step` has to know, ``[b, 4]``. No host read.

        ``reach [b]``: how many tokens of the drafted block the verifier saw (0: not verified). ``finite [b]``: were the verifier's logits numbers? Both are
        None where no row was verified.
        """
        canvas, index, positions = self.canvas, draft.rows, self.positions(draft.rows)
        block = canvas.write(index, positions, draft.block, choice, draft.confidence)
        broken = ~torch.isfinite(draft.confidence).all(-1) * 1
        if reach is not None:
            accepted = (choice.how == How.ACCEPTED).sum(-1)
            canvas.note_verify(index, reach > 0, draft.masked.sum(-1), draft.span_length, accepted)
            broken = broken + ~finite * 2
        verified_to = self._verified_to(draft, choice, torch.zeros_like(index) if reach is None else reach)
        canvas.step(index)
        self.step.index_add_(0, index, torch.ones_like(index))
        self.decoded.index_add_(0, index, choice.count)
        stops = (block[..., None] == self._stops).any(-1) & (positions >= canvas.prompt_length[index][:, None])
        left, stop = self._left(draft, block, stops), stops.any(-1)
        return torch.stack([left, stop.long(), broken, verified_to], 1)

    def _verified_to(self, draft: Draft, choice: Choice, reach: Tensor) -> Tensor:
        """``[b]``: how many tokens of the block a causal forward of this step was conditioned on as they now are."""
        return reach * ~(choice.take & (choice.tokens != draft.tokens)).any(-1)

    def _left(self, draft: Draft, block: Tensor, stops: Tensor) -> Tensor:
        """``[b]``: positions still to be decided before a block is finished. ``block, stops [b, L]``: ids after this step, generated stop tokens."""
        return (block == self.canvas.mask_id).sum(-1)

    def finish_step(self, rows: Sequence[int], read: list[list[int]]) -> list[Finished]:
        """Count the step of every row, and find those whose block is finished, from what `record` returned."""
        finished = []
        for i, (left, stop, broken, verified_to) in zip(rows, read, strict=True):
            block = self.blocks[i]
            block.step += 1
            self.canvas.rows[i].iterations += 1
            if broken:
                which = "draft" if broken % 2 else "verifier"
                raise FloatingPointError(f"{self.where(i)}: the {which} logits hold NaN or infinity")
            if left == 0:
                last = bool(stop) or block.start + self.block_length >= block.total
                finished.append(Finished(i, last, verified_to, bool(stop)))
            elif block.step >= 2 * self.steps:
                raise RuntimeError(
                    f"{self.where(i)}: {left} positions still masked after twice the {self.steps} denoising steps"
                )
        return finished

    def advance(self, rows: Sequence[int]) -> None:
        """Move rows to their next block."""
        for i in rows:
            self.blocks[i].start += self.block_length
            self.blocks[i].step = 0
        index = self.canvas.index(rows)
        self.start[index] += self.block_length
        self.decoded[index] = 0
        self.step[index] = 0

    def text_so_far(self, i: int) -> list[int]:
        """Generated ids of row ``i`` up to its current block's end (a device read; for stop strings)."""
        length, end = len(self.canvas.rows[i].prompt), self.blocks[i].start + self.block_length
        return self.canvas.tokens[i, length : min(end, length + self.canvas.max_new_tokens)].tolist()

    def new_tokens(self, i: int) -> list[int]:
        """Generated ids of the current block of row ``i``, as far as they are returned (a device read; for streaming)."""
        length, start = len(self.canvas.rows[i].prompt), self.blocks[i].start
        limit = self.blocks[i].total if self.round_to_blocks else length + self.canvas.max_new_tokens
        return self.canvas.tokens[i, max(start, length) : min(start + self.block_length, limit)].tolist()

    def end(self, i: int) -> int:
        return self.blocks[i].start + self.block_length

    def returned(self, i: int, ids: list[int], end: int) -> list[int]:
        """Up to a stop token; without ``trim_stop_tokens`` all of the block that holds it, with ``round_to_blocks`` whole blocks."""
        length, whole, trim = len(self.canvas.rows[i].prompt), self.round_to_blocks, self.trim_stop_tokens
        tokens = ids[length : self.blocks[i].total] if whole and not trim else ids[length:end]
        if not whole:
            tokens = tokens[: self.canvas.max_new_tokens]
        if trim:
            tokens = tokens[: first_stop(tokens, self.canvas.stop_ids)]
        return tokens


def first_stop(tokens: list[int], stop_ids: Sequence[int]) -> int:
    """Where the first stop token stands (the length where there is none)."""
    return next((k for k, token in enumerate(tokens) if token in stop_ids), len(tokens))
