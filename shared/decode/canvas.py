"""The canvas: prompt, tokens, trace and uniforms of every text in flight.

Rows are independent: each has its own prompt length and its own progress. A row that finishes is free for the next waiting prompt, so a long list of
prompts keeps a batch full. Everything a step touches lives on the device. The canvas knows no blocks: where a row stands in its text is a cursor's
business (`shared.decode.cursor`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from shared.network.indices import Indices
from shared.network.memory import check_room
from shared.output import Completion
from shared.policy.draft import Choice
from shared.policy.uniforms import Uniforms
from shared.trace import How, Pass, Spent, Trace, Verify


@dataclass
class Row:
    """What the host knows of one text in flight. ``spent``: lane -> kind -> the numbers of a `Spent`."""

    position: int  # of its prompt among those of the call
    request: int
    prompt: list[int]
    began: float
    iterations: int = 0
    spent: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    def spend(self, lane: str, kind: str, *numbers: int) -> None:
        """Add to what ``lane`` has spent on this text; ``numbers`` are those of a `Spent`."""
        total = self.spent.setdefault(lane, {}).setdefault(kind, [0] * 5)
        for k, number in enumerate(numbers):
            total[k] += number

    def lanes(self) -> dict[str, dict[str, Spent]]:
        return {lane: {kind: Spent(*s) for kind, s in kinds.items()} for lane, kinds in self.spent.items()}


class Canvas:
    """``rows`` texts at a time out of ``prompts``, known by their numbers in ``requests``, at most ``width`` tokens each.

    ``iterations``: the most steps a text may take, each with at most ``verifies_a_step``.
    """

    STATE: ClassVar[tuple[str, ...]] = (
        "tokens",
        "prompt_length",
        "iteration",
        "history",
        "confidence",
        "verifies",
        "_kinds",
    )

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        requests: Sequence[int] | None,
        rows: int,
        allocated: int,
        width: int,
        iterations: int,
        verifies_a_step: int = 1,
        max_new_tokens: int,
        mask_id: int,
        stop_ids: Sequence[int],
        device: torch.device,
        uniforms: Uniforms,
    ):
        """Tensors are made for ``allocated >= rows`` rows, so that graphs of an earlier decode may fit."""
        self.max_new_tokens, self.mask_id, self.stop_ids = max_new_tokens, mask_id, tuple(stop_ids)
        self.uniforms, self.iterations, self.verifies_a_step = uniforms, iterations, verifies_a_step
        requests = range(len(prompts)) if requests is None else requests
        self.waiting = deque(zip(range(len(prompts)), requests, map(list, prompts), strict=True))
        self.rows: list[Row | None] = [None] * rows
        needed = 8 * allocated * (5 * width + 4 * iterations * verifies_a_step)
        check_room(
            f"the trace of {allocated} texts of {width} tokens and {iterations} steps", needed, device,
            "fewer texts at a time (batch_size), shorter ones, fewer denoising_steps",
        )  # fmt: skip
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.long, device=device)  # noqa: E731
        self.tokens = zeros(allocated, width)
        self.prompt_length = zeros(allocated)
        self.iteration = zeros(allocated)
        self.history = zeros(allocated, 3, width)  # step_of, how_of, rank_of
        self.confidence = torch.zeros(allocated, width, device=device)
        self.verifies = zeros(allocated, 4, iterations * verifies_a_step)  # step (-1: none), proposed, sent, accepted
        self._kinds = torch.arange(3, device=device)[:, None]
        self.index = Indices(device)  # lists of rows as device tensors, not to be written to

    @property
    def active(self) -> list[int]:
        """Rows with a text in flight."""
        return [i for i, row in enumerate(self.rows) if row is not None]

    def admit(self) -> list[int]:
        """Give free rows to waiting prompts; returns the rows filled."""
        filled = []
        for i, row in enumerate(self.rows):
            if row is None and self.waiting:
                self._admit(i, *self.waiting.popleft())
                filled.append(i)
        return filled

    def _admit(self, i: int, position: int, request: int, prompt: list[int]) -> None:
        length = len(prompt)
        self.rows[i] = Row(position, request, prompt, time.perf_counter())
        self.tokens[i] = self.mask_id
        self.tokens[i, :length] = torch.tensor(prompt, dtype=torch.long).to(self.tokens.device)
        self.prompt_length[i] = length
        self.iteration[i], self.verifies[i], self.confidence[i] = 0, -1, 0
        self.history[i, 0], self.history[i, 1:] = -1, 0
        self.history[i, 1, :length] = int(How.PROMPT)
        self.uniforms.assign(i, request if self.uniforms.recorded is None else position)

    def write(self, rows: Tensor, positions: Tensor, known: Tensor, choice: Choice, confidence: Tensor) -> Tensor:
        """Write a step's ``choice`` at ``positions [b, L]`` of ``rows [b]`` into tokens and trace; ``known [b, L]`` are the ids before it. Returns the ids
        after it. No host read."""
        take, at = choice.take, (rows[:, None], positions)
        ids = torch.where(take, choice.tokens, known)
        self.tokens[at] = ids
        now = torch.stack([self.iteration[rows][:, None].expand_as(choice.rank), choice.how, choice.rank], 1)
        cell = (rows[:, None, None], self._kinds, positions[:, None, :])
        self.history[cell] = torch.where(take[:, None], now, self.history[cell])
        self.confidence[at] = torch.where(take, confidence, self.confidence[at])
        return ids

    def write_one(self, rows: Tensor, at: Tensor, tokens: Tensor, how: How) -> None:
        """Write ``tokens [b]`` at positions ``at [b]`` of ``rows [b]``, as an iteration of its own. No host read."""
        self.tokens[rows, at] = tokens
        now = [self.iteration[rows], torch.full_like(rows, int(how)), torch.zeros_like(rows)]
        self.history[rows, :, at] = torch.stack(now, 1)
        self.step(rows)

    def note_verify(
        self, rows: Tensor, happened: Tensor, proposed: Tensor, sent: Tensor, accepted: Tensor, number: int = 0
    ) -> None:
        """Note verify ``number`` of this step of those ``rows [b]`` where it ``happened [b]``; the rest are `Verify` numbers, ``[b]`` each. No host read."""
        iteration = self.iteration[rows]
        entry = torch.stack([torch.where(happened, iteration, -1), proposed, sent, accepted], 1)
        self.verifies[rows, :, iteration * self.verifies_a_step + number] = entry

    def step(self, rows: Tensor) -> None:
        """An iteration of ``rows [b]`` is over. No host read."""
        self.iteration.index_add_(0, rows, torch.ones_like(rows))

    def retire(
        self,
        i: int,
        *,
        ids: list[int],
        tokens: list[int],
        block_length: int,
        edits: list[tuple[int, int, int, int]],
        decode: Callable[[list[int]], str] | None,
        passes: list[Pass] | None = None,
    ) -> Completion:
        """Take row ``i``'s text off the canvas (device reads, once a text): ``ids`` were decided, prompt included, and it returns ``tokens``."""
        row, end = self.rows[i], len(ids)
        self.rows[i] = None
        used, exist = int(self.uniforms.cursor[i]), self.uniforms.available(row.position)
        if used > exist:
            raise RuntimeError(f"request {row.request} used {used} uniforms, only {exist} exist")
        most = row.iterations * self.verifies_a_step
        step_of, how_of, rank_of = self.history[i, :, :end].tolist()
        trace = Trace(
            prompt_length=len(row.prompt),
            block_length=block_length,
            token_ids=ids,
            step_of=step_of,
            how_of=how_of,
            rank_of=rank_of,
            confidence_of=self.confidence[i, :end].tolist(),
            steps=row.iterations,
            verifies=[Verify(*v) for v in self.verifies[i, :, :most].T.tolist() if v[0] >= 0],
            lanes=row.lanes(),
            edits=edits,
            mask_id=self.mask_id,
            passes=passes or [],
        )
        seconds = time.perf_counter() - row.began
        return Completion(row.request, tokens, trace, seconds, used, decode(tokens) if decode else None)
