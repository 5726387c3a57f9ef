"""A batch of texts: each a prompt and a region of masks behind it, all of which is decoded at once.

What stands is a `shared.decode.canvas.Canvas`, so every position's step, origin and order are traced. A prompt never changes, nor does a token that was
written; a text is `live` until nothing before its first stop token is masked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shared.decode.calls import Stop
from shared.decode.canvas import Canvas
from shared.decode.stop_strings import StopStrings
from shared.output import Completion
from shared.policy.draft import Choice, rank_by
from shared.policy.uniforms import Uniforms
from shared.trace import How, Spent


@dataclass(frozen=True)
class Ask:
    """What is wanted of a batch of texts. ``requests`` number them (default: 0, 1, ...); ``draws``: random numbers each may use. ``stop``: strings that end
    a text. ``whole``: a stop token ends no text, so that all of the region is decoded."""

    gen_length: int
    mask_id: int
    stop_ids: tuple[int, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    requests: Sequence[int] | None = None
    seed: int = 0
    draws: int = 0
    recorded: Sequence[Sequence[float]] | None = None
    tokenizer: Any = None
    stop: Stop = field(default_factory=Stop)
    trim: bool = True
    whole: bool = False
    on_block: Callable[[int, list[int]], None] | None = None


class Texts:
    """``prompts`` as ids, all in flight at once."""

    def __init__(self, prompts: Sequence[Sequence[int]], ask: Ask):
        self.ask, self.prompts = ask, [list(p) for p in prompts]
        rows, width = len(self.prompts), max(map(len, self.prompts)) + ask.gen_length
        longest = ask.draws if ask.recorded is None else max(map(len, ask.recorded), default=1)
        uniforms = Uniforms(rows, max(1, longest), seed=ask.seed, device=ask.device, recorded=ask.recorded)
        self.canvas = Canvas(
            self.prompts,
            requests=ask.requests,
            rows=rows,
            allocated=rows,
            width=width,
            iterations=ask.gen_length + 1,
            max_new_tokens=ask.gen_length,
            mask_id=ask.mask_id,
            stop_ids=ask.stop_ids,
            device=ask.device,
            uniforms=uniforms,
        )
        self.canvas.admit()
        self.live = list(range(rows))
        self.lengths = [len(p) for p in self.prompts]
        self.given = [0] * rows  # tokens already streamed
        self.batch: dict[str, dict[str, Spent]] = {}
        text_of = ask.tokenizer and (lambda ids: ask.tokenizer.decode(ids, skip_special_tokens=True))
        self.text_of, self.strings = text_of, StopStrings(ask.stop, text_of)
        self.stops = torch.tensor(sorted(ask.stop_ids), dtype=torch.long, device=ask.device)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def gen_length(self) -> int:
        return self.ask.gen_length

    @property
    def mask_id(self) -> int:
        return self.ask.mask_id

    def index(self, rows: Sequence[int]) -> Tensor:
        """``rows`` as a device tensor."""
        return self.canvas.index(rows)

    def positions(self, rows: Sequence[int]) -> Tensor:
        """``[b, G]``: where the regions of ``rows`` lie in their texts."""
        first = self.canvas.prompt_length[self.index(rows)]
        return first[:, None] + torch.arange(self.gen_length, device=first.device)

    def region(self, rows: Sequence[int]) -> Tensor:
        """``[b, G]``: the regions of ``rows``."""
        return self.canvas.tokens[self.index(rows)[:, None], self.positions(rows)]

    def with_region(self, rows: Sequence[int], region: Tensor) -> Tensor:
        """``[b, T]``: the texts of ``rows`` with another ``region [b, G]``; behind a text stand masks."""
        ids = self.canvas.tokens[self.index(rows)]
        return ids.scatter(1, self.positions(rows), region)

    def write(
        self, rows: Sequence[int], take: Tensor, tokens: Tensor, how: How, confidence: Tensor, key: Tensor | None = None
    ) -> None:
        """Write ``tokens [b, G]`` at the positions ``take [b, G]`` that are masks still; ``confidence [b, G]`` is what they had. Inside the step they come
        in ascending ``key`` (default: the surest first), behind those it has already."""
        known = self.region(rows)
        take = take & (known == self.mask_id)
        rank = rank_by(-confidence if key is None else key, take) + self._before(rows)[:, None]
        kinds = torch.full_like(rank, int(how)) * take
        choice = Choice(tokens, kinds, rank * take, take.sum(-1))
        self.canvas.write(self.index(rows), self.positions(rows), known, choice, confidence.float())

    def _before(self, rows: Sequence[int]) -> Tensor:
        """``[b]``: how many tokens this step has written already."""
        index = self.index(rows)
        steps = self.canvas.history[index, 0].gather(1, self.positions(rows))
        return (steps == self.canvas.iteration[index][:, None]).sum(-1)

    def note_verify(self, rows: Sequence[int], sent: Tensor, accepted: Tensor) -> None:
        """A verify of ``sent [b]`` drafts, of which ``accepted [b]`` were kept; none happened where none were sent."""
        self.canvas.note_verify(self.index(rows), sent > 0, sent, sent, accepted)

    def spend(self, lane: str, kind: str, rows: Sequence[int], each: Sequence[Spent]) -> None:
        """One pass for ``rows``; ``each`` is what a text pays, as if it were alone."""
        for i, spent in zip(rows, each, strict=True):
            self.canvas.rows[i].spend(lane, kind, *spent)
        together = Spent(1, *(sum(s[k] for s in each) for k in range(1, 5)))
        kinds = self.batch.setdefault(lane, {})
        kinds[kind] = kinds.get(kind, Spent()).plus(together)

    def end_step(self, rows: Sequence[int]) -> list[int]:
        """A step of ``rows`` is over: streams what is decided and lets go of texts that are finished. Returns the rows that go on. One host read."""
        self.canvas.step(self.index(rows))
        for i in rows:
            self.canvas.rows[i].iterations += 1
        decided, ended = self._decided(rows)
        done = set()
        for i, count, stopped in zip(rows, decided, ended, strict=True):
            stopped = stopped or (self.strings.strings and self.strings.kept(self.tokens(i, count)) is not None)
            if stopped or count == self.gen_length:
                done.add(i)
            if self.ask.on_block and count > self.given[i]:
                self.ask.on_block(self.canvas.rows[i].request, self.tokens(i, count)[self.given[i] :])
                self.given[i] = count
        self.live = [i for i in self.live if i not in done]
        return [i for i in rows if i not in done]

    def _decided(self, rows: Sequence[int]) -> tuple[list[int], list[bool]]:
        """How many tokens from the left on are decided in each of ``rows``, up to its first stop token, and is there one among them?"""
        region = self.region(rows)
        masked = torch.nn.functional.pad(region == self.mask_id, (0, 1), value=True).int().argmax(-1)
        stops = torch.zeros_like(region, dtype=torch.bool) if self.ask.whole else torch.isin(region, self.stops)
        stop = torch.nn.functional.pad(stops, (0, 1), value=True).int().argmax(-1)
        counts = torch.stack([masked, stop]).tolist()
        ended = [s < m for m, s in zip(*counts, strict=True)]
        return [s + 1 if e else m for m, s, e in zip(*counts, ended, strict=True)], ended

    def tokens(self, i: int, count: int) -> list[int]:
        """The first ``count`` tokens of a region."""
        first = self.lengths[i]
        return self.canvas.tokens[i, first : first + count].tolist()

    def finish(self) -> list[Completion]:
        """Every text, in the order of the prompts. One device read a text."""
        return [self._finish(i) for i in range(len(self))]

    def _finish(self, i: int) -> Completion:
        (count,), _ = self._decided([i])
        tokens = self.tokens(i, count)
        ids = self.prompts[i] + tokens
        kept = (
            tokens[:-1]
            if self.ask.trim and not self.ask.whole and tokens and tokens[-1] in self.ask.stop_ids
            else tokens
        )
        completion = self.canvas.retire(i, ids=ids, tokens=kept, block_length=0, edits=[], decode=self.text_of)
        return self.strings.cut(completion)
