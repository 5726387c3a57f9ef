"""The rows a block-diffusion decoder works on: canvas, blocks, trace and uniforms of every text in flight.

Rows are independent: each has its own prompt length, block and step. A row that finishes is free for the next waiting prompt, so a long
list of prompts keeps a batch full. Everything a step touches lives on the device; the host keeps only what it decides itself
(block starts, step counts, forwards) and reads the device once a step, for `Batch.finish_step`.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from shared.network.indices import Indices
from shared.options import Blocks
from shared.output import Completion
from shared.policy.draft import Choice, Draft
from shared.policy.uniforms import Uniforms
from shared.policy.unmask import step_quota
from shared.trace import How, Trace


@dataclass
class Row:
    """What the host knows of one text in flight."""

    position: int  # of its prompt among those of the call
    request: int
    prompt: list[int]
    start: int  # first position of the current block
    total: int  # positions up to the end of the last block
    began: float
    step: int = 0  # iterations spent in the current block
    iterations: int = 0
    uncommitted: bool = False  # the block before the current one still has to be committed
    block_cached: bool = False  # the cache holds keys of the whole current block, written by a draft
    forwards: Counter = field(default_factory=Counter)

    @property
    def where(self) -> str:
        """What an error calls the place this text has got to."""
        return f"request {self.request}, block at position {self.start}, step {self.step}"


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


def by_tokens(lengths: dict[int, int], most: int) -> list[list[int]]:
    """The keys in groups of at most ``most`` tokens each, padding to the longest of the group counted in (a longer text is a group of its own)."""
    groups: list[list[int]] = []
    for row, length in lengths.items():
        if groups and (len(groups[-1]) + 1) * max(length, *(lengths[i] for i in groups[-1])) <= most:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


class Batch:
    """``rows`` texts at a time out of ``prompts``, known by their numbers in ``requests``. ``block_length`` L, ``steps`` S: see `shared.options.Blocks`."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        requests: Sequence[int] | None,
        rows: int,
        block_length: int,
        steps: int,
        max_new_tokens: int,
        mask_id: int,
        stop_ids: Sequence[int],
        device: torch.device,
        uniforms: Uniforms,
        room: tuple[int, int] = (0, 0),
    ):
        """``room``: allocate for at least this many rows and positions, so that graphs of an earlier decode may fit."""
        self.block_length, self.steps, self.max_new_tokens = block_length, steps, max_new_tokens
        self.mask_id, self.stop_ids, self.uniforms = mask_id, tuple(stop_ids), uniforms
        requests = range(len(prompts)) if requests is None else requests
        self.waiting = deque(zip(range(len(prompts)), requests, map(list, prompts), strict=True))
        self.rows: list[Row | None] = [None] * rows
        self.forwards: Counter = Counter()
        self.forward_tokens: Counter = Counter()
        self.capacity = self._capacity(prompts)
        allocated, width = max(rows, room[0]), max(self.capacity, room[1])
        iterations = 2 * steps * (width // block_length + 2)
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.long, device=device)  # noqa: E731
        self.tokens = zeros(allocated, width)
        self.start = zeros(allocated)
        self.step = zeros(allocated)  # of the current block
        self.decoded = zeros(allocated)
        self.prompt_length = zeros(allocated)
        self.iteration = zeros(allocated)
        self.history = zeros(allocated, 3, width)  # step_of, how_of, rank_of
        self.confidence = torch.zeros(allocated, width, device=device)
        self.spans = zeros(allocated, 2, iterations)  # verified_span, accepted
        self.schedule = torch.tensor(step_quota(block_length, steps), device=device)
        self._indices = Indices(device)
        self._kinds = torch.arange(3, device=device)[:, None]
        self._stops = torch.tensor(self.stop_ids, dtype=torch.long, device=device)
        self._place = torch.arange(block_length, device=device)

    def _total(self, prompt_length: int) -> int:
        return whole_blocks(prompt_length + self.max_new_tokens, self.block_length)

    def _capacity(self, prompts: Sequence[Sequence[int]]) -> int:
        return max(self._total(len(p)) for p in prompts)

    @property
    def active(self) -> list[int]:
        """Rows with a text in flight."""
        return [i for i, row in enumerate(self.rows) if row is not None]

    def admit(self) -> list[int]:
        """Give free rows to waiting prompts; returns the rows filled. The caller prefills them."""
        filled = []
        for i, row in enumerate(self.rows):
            if row is None and self.waiting:
                self._place_request(i, *self.waiting.popleft())
                filled.append(i)
        return filled

    def _place_request(self, i: int, position: int, request: int, prompt: list[int]) -> None:
        length = len(prompt)
        start = length // self.block_length * self.block_length
        self.rows[i] = Row(position, request, prompt, start, self._total(length), time.perf_counter())
        self.tokens[i] = self.mask_id
        self.tokens[i, :length] = torch.tensor(prompt, dtype=torch.long).to(self.tokens.device)
        self.start[i], self.prompt_length[i] = start, length
        self.step[i], self.decoded[i], self.iteration[i], self.spans[i], self.confidence[i] = 0, 0, 0, 0, 0
        self.history[i, 0], self.history[i, 1:] = -1, 0
        self.history[i, 1, :length] = int(How.PROMPT)
        self.uniforms.assign(i, request if self.uniforms.recorded is None else position)

    def prefilled(self, i: int) -> int:
        """How many tokens of the prompt of row ``i``, whole blocks of them, are encoded before its first step."""
        return self.rows[i].start

    def index(self, rows: Sequence[int]) -> Tensor:
        """``rows`` as a device tensor ``[b]``, not to be written to."""
        return self._indices(rows)

    @property
    def one_token_is_enough(self) -> bool:
        """Is the quota of every step a single token?"""
        return self.steps >= self.block_length

    def positions(self, rows: Tensor, back: int = 0) -> Tensor:
        """``[b, L]``: absolute positions of the current block of ``rows [b]``, or of the block ``back`` positions before it."""
        return (self.start[rows] - back)[:, None] + self._place

    def block(self, rows: Tensor, back: int = 0) -> Tensor:
        """``[b, L]``: ids of that block."""
        return self.tokens[rows[:, None], self.positions(rows, back)]

    def count(self, kind: str, rows: Sequence[int], tokens: int = 0) -> None:
        """One forward of this kind over these rows, ``tokens`` in all."""
        self.forwards[kind] += 1
        self.forward_tokens[kind] += tokens
        for i in rows:
            self.rows[i].forwards[kind] += 1

    def quota(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``(tokens due [b], overtime [b])`` of this step of ``rows [b]``. After the last step the schedule runs once more, in overtime."""
        step = self.step[rows]
        return self.schedule[step % self.steps], step >= self.steps

    def record(self, draft: Draft, choice: Choice, reach: Tensor, finite: Tensor) -> Tensor:
        """Write the step's choice into canvas and trace; returns what `finish_step` has to know, ``[b, 4]``. No host read.

        ``reach [b]``: how many tokens of the drafted block the verifier saw (0: not verified). ``finite [b]``: were the verifier's logits numbers?
        """
        index, positions = draft.rows, self.positions(draft.rows)
        take, at = choice.take, (draft.rows[:, None], positions)
        block = torch.where(take, choice.tokens, draft.block)
        self.tokens[at] = block
        now = torch.stack([self.iteration[index][:, None].expand_as(choice.rank), choice.how, choice.rank], 1)
        cell = (index[:, None, None], self._kinds, positions[:, None, :])
        self.history[cell] = torch.where(take[:, None], now, self.history[cell])
        self.confidence[at] = torch.where(take, draft.confidence, self.confidence[at])
        accepted = (choice.how == How.ACCEPTED).sum(-1)
        spans = torch.stack([draft.span_length, accepted], 1) * (reach > 0)[:, None]
        self.spans[index, :, self.iteration[index]] = spans
        one = torch.ones_like(index)
        self.iteration.index_add_(0, index, one)
        self.step.index_add_(0, index, one)
        self.decoded.index_add_(0, index, choice.count)
        stops = (block[..., None] == self._stops).any(-1) & (positions >= self.prompt_length[index][:, None])
        left, stop = self._left(draft, block, stops), stops.any(-1)
        broken = ~torch.isfinite(draft.confidence).all(-1) * 1 + ~finite * 2
        as_drafted = ~(take & (choice.tokens != draft.tokens)).any(-1)
        return torch.stack([left, stop.long(), broken, reach * as_drafted], 1)

    def _left(self, draft: Draft, block: Tensor, stops: Tensor) -> Tensor:
        """``[b]``: positions still to be decided before a block is finished. ``block, stops [b, L]``: ids after this step, generated stop tokens."""
        return (block == self.mask_id).sum(-1)

    def finish_step(self, rows: Sequence[int], read: list[list[int]]) -> list[Finished]:
        """Count the step of every row, and find those whose block is finished, from what `record` returned."""
        finished = []
        for i, (left, stop, broken, verified_to) in zip(rows, read, strict=True):
            row = self.rows[i]
            row.step += 1
            row.iterations += 1
            if broken:
                which = "draft" if broken % 2 else "verifier"
                raise FloatingPointError(f"{row.where}: the {which} logits hold NaN or infinity")
            if left == 0:
                last = bool(stop) or row.start + self.block_length >= row.total
                finished.append(Finished(i, last, verified_to, bool(stop)))
            elif row.step >= 2 * self.steps:
                raise RuntimeError(
                    f"{row.where}: {left} positions still masked after twice the {self.steps} denoising steps"
                )
        return finished

    def advance(self, rows: Sequence[int]) -> None:
        """Move rows to their next block."""
        for i in rows:
            self.rows[i].start += self.block_length
            self.rows[i].step = 0
        index = self.index(rows)
        self.start[index] += self.block_length
        self.decoded[index] = 0
        self.step[index] = 0

    def new_tokens(self, i: int, limit: int) -> list[int]:
        """Generated ids of the current block of row ``i``, up to ``limit`` of the whole text (a device read; for streaming)."""
        row = self.rows[i]
        first = max(row.start, len(row.prompt))
        return self.tokens[i, first : min(row.start + self.block_length, len(row.prompt) + limit)].tolist()

    def _end(self, i: int) -> int:
        """Up to where the trace of a finished text runs."""
        return self.rows[i].start + self.block_length

    def _returned(self, ids: list[int], row: Row, end: int, blocks: Blocks) -> list[int]:
        """The tokens a text gives back, of a canvas that is decided up to ``end``."""
        length, whole, trim = len(row.prompt), blocks.round_to_blocks, blocks.trim_stop_tokens
        tokens = ids[length : row.total] if whole and not trim else ids[length:end]
        if not whole:
            tokens = tokens[: self.max_new_tokens]
        if trim:
            tokens = tokens[: next((k for k, t in enumerate(tokens) if t in self.stop_ids), len(tokens))]
        return tokens

    def _edits(self, i: int) -> list[tuple[int, int, int, int]]:
        """`Trace.edits` of row ``i``'s text."""
        return []

    def retire(self, i: int, blocks: Blocks, decode: Callable[[list[int]], str] | None) -> Completion:
        """Take row ``i``'s finished text off the batch (device reads, once a text)."""
        row, end = self.rows[i], self._end(i)
        edits = self._edits(i)
        self.rows[i] = None
        ids = self.tokens[i].tolist()
        used, exist = int(self.uniforms.cursor[i]), self.uniforms.available(row.position)
        if used > exist:
            raise RuntimeError(f"request {row.request} used {used} uniforms, only {exist} exist")
        length = len(row.prompt)
        tokens = self._returned(ids, row, end, blocks)
        step_of, how_of, rank_of = self.history[i, :, :end].tolist()
        verified, accepted = self.spans[i, :, : row.iterations].tolist()
        trace = Trace(
            prompt_length=length,
            block_length=self.block_length,
            token_ids=ids[:end],
            step_of=step_of,
            how_of=how_of,
            rank_of=rank_of,
            confidence_of=self.confidence[i, :end].tolist(),
            verified_span=verified,
            accepted=accepted,
            forwards=dict(row.forwards),
            edits=edits,
        )
        seconds = time.perf_counter() - row.began
        return Completion(row.request, tokens, trace, seconds, used, decode(tokens) if decode else None)
