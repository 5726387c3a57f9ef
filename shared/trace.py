"""A decode as data: when, how and in which order inside its step each position was decided, and what each step cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

KINDS = ("prefill", "draft", "verify", "commit")


class How(IntEnum):
    """How a position got its token."""

    NONE = 0
    PROMPT = 1
    UNMASKED = 2  # by the unmasking rule: a plain step, or the fallback of a speculative one
    ACCEPTED = 3  # a drafted token the verifier accepted
    RESAMPLED = 4  # the verifier's own token at the first rejection
    KEPT = 5  # the rejected draft itself (allow_resample off)
    RATIO = 6  # a later draft whose acceptance ratio passed ssd_ratio_threshold
    CONFIDENT = 7  # a draft above confidence_threshold (always_check_high_confidence)
    NEXT = 8  # the token that follows a committed block, where the network predicts the next token
    EDITED = 9  # a later, better token; what `Trace.edits` lists, never how a position was first decided
    FORCED = 10  # the likeliest draft of a block that has to go on although nothing in it is confident
    BONUS = 11  # the verifier's own token after a span all of which it accepted
    FILLED = 12  # by the verifier's own decode, where the drafter left a mask
    REMASKED = 13  # taken back: an edit to the mask token, decided anew later


class Verify(NamedTuple):
    """One verify of a text: in which ``step``, how many tokens the drafter ``proposed``, how many were ``sent``, how many ``accepted``."""

    step: int
    proposed: int
    sent: int
    accepted: int


class Pass(NamedTuple):
    """A draft of several blocks: from position ``start`` on it encoded what was finished, from ``first`` to ``end`` it drafted."""

    start: int
    first: int
    end: int


class Spent(NamedTuple):
    """What passes of one model over one text cost: ``forwards``, the ``tokens`` in them, positions that got ``logits``, cached tokens read
    (``context``), and query-key ``pairs``."""

    forwards: int = 0
    tokens: int = 0
    logits: int = 0
    context: int = 0
    pairs: int = 0

    def plus(self, other: Spent) -> Spent:
        return Spent(*[a + b for a, b in zip(self, other, strict=True)])


Lanes = Mapping[str, Mapping[str, Spent]]  # lane -> kind of forward -> what was spent


def add_lanes(parts: list[Lanes]) -> dict[str, dict[str, Spent]]:
    """The sum of several: by lane, then by kind."""
    total: dict[str, dict[str, Spent]] = {}
    for part in parts:
        for lane, kinds in part.items():
            mine = total.setdefault(lane, {})
            for kind, spent in kinds.items():
                mine[kind] = mine.get(kind, Spent()).plus(spent)
    return total


def by_kind(lanes: Lanes) -> dict[str, int]:
    """Forwards of all lanes together, by kind."""
    total = Counter()
    for kinds in lanes.values():
        total.update({kind: spent.forwards for kind, spent in kinds.items()})
    return dict(total)


@dataclass(frozen=True)
class Trace:
    """One text. Lists over positions run from the prompt's first token to the last decoded one, trimmed tail included.

    ``block_length``: 0 where there are no blocks. ``step_of``: iteration that wrote the position (-1: prompt). ``how_of``: a `How`. ``rank_of``: order
    inside the iteration. ``confidence_of``: what the drafter gave its token there. ``steps``: iterations in all; ``verifies``: every `Verify`, in order,
    any number of them a step. ``lanes``: what each model spent on this text, by kind of forward, as if it ran alone. ``edits``: tokens replaced after they
    were decided, as ``(iteration, position, old, new)`` in order; an edit to ``mask_id`` takes the token back (remasking), and the lists above then tell
    of the last time the position was decided. ``token_ids`` are the final ones. ``passes``: one a step where drafts are of several blocks, else none.
    """

    prompt_length: int
    block_length: int
    token_ids: list[int]
    step_of: list[int]
    how_of: list[int]
    rank_of: list[int]
    confidence_of: list[float]
    steps: int
    verifies: list[Verify]
    lanes: dict[str, dict[str, Spent]] = field(default_factory=dict)
    edits: list[tuple[int, int, int, int]] = field(default_factory=list)
    mask_id: int | None = None
    passes: list[Pass] = field(default_factory=list)

    @property
    def forwards(self) -> dict[str, int]:
        """Passes over this text by kind, all lanes together."""
        return by_kind(self.lanes)

    @property
    def total_forwards(self) -> int:
        return sum(self.forwards.values())

    @property
    def verified_span(self) -> list[int]:
        """``[steps]``: tokens sent to the verifier in each iteration (0: none)."""
        return self._by_step("sent")

    @property
    def accepted(self) -> list[int]:
        """``[steps]``: how many of those were accepted."""
        return self._by_step("accepted")

    def _by_step(self, name: str) -> list[int]:
        found = [0] * self.steps
        for verify in self.verifies:
            found[verify.step] += getattr(verify, name)
        return found

    @property
    def gained(self) -> int:
        """Tokens that verifies brought: accepted drafts, and the verifier's own token after them."""
        own = sum(h in (How.RESAMPLED, How.BONUS) for h in self.how_of)
        return sum(v.accepted for v in self.verifies) + own

    @property
    def remasked(self) -> list[tuple[int, int, int]]:
        """Tokens taken back, as ``(iteration, position, token)``."""
        return [(step, position, old) for step, position, old, new in self.edits if new == self.mask_id]

    def order(self) -> list[list[int]]:
        """Positions decided at each step, in the order in which they were chosen."""
        steps: list[list[int]] = [[] for _ in range(self.steps)]
        for position in range(self.prompt_length, len(self.step_of)):
            if self.step_of[position] >= 0:
                steps[self.step_of[position]].append(position)
        return [sorted(s, key=lambda p: self.rank_of[p]) for s in steps]

    def counts(self) -> dict[str, int]:
        """Generated positions by how they were decided."""
        found = Counter(How(h).name.lower() for h in self.how_of[self.prompt_length :])
        return {h.name.lower(): found[h.name.lower()] for h in How if found[h.name.lower()] and h != How.NONE}

    def edit_counts(self) -> dict[str, int]:
        """Edits by how the token they replaced had got there (``edited``: by an earlier edit)."""
        how, found = dict(enumerate(self.how_of)), Counter()
        for _, position, _, new in self.edits:
            found[How(how[position]).name.lower()] += 1
            how[position] = How.REMASKED if new == self.mask_id else How.EDITED
        return {h.name.lower(): found[h.name.lower()] for h in How if found[h.name.lower()]}

    def first_token(self, position: int) -> int:
        """The token that was first decided at ``position``."""
        return next((old for _, p, old, _ in self.edits if p == position), self.token_ids[position])

    def to_json(self) -> dict:
        """Plain data. ``verified_span`` and ``accepted`` go along: readers of a trace want them by step."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain["verifies"] = [v._asdict() for v in self.verifies]
        plain["lanes"] = {lane: {kind: s._asdict() for kind, s in kinds.items()} for lane, kinds in self.lanes.items()}
        more = {"forwards": self.forwards, "verified_span": self.verified_span, "accepted": self.accepted}
        return {**plain, **more, "how_names": [h.name.lower() for h in How]}


_MARKS = {
    How.ACCEPTED: "+",
    How.RESAMPLED: "~",
    How.BONUS: "*",
    How.KEPT: "-",
    How.RATIO: "r",
    How.CONFIDENT: "c",
    How.FORCED: "!",
    How.FILLED: "v",
}


def format_trace(trace: Trace, tokenizer=None) -> str:
    """The trace for people: one line a step, ``|`` where a block begins, then forwards by kind.

    Marks: plain = unmasked by the rule, ``+`` accepted, ``~`` resampled, ``*`` bonus, ``-`` rejected draft kept, ``r`` ratio, ``c`` confident, ``!`` forced,
    ``v`` filled by the verifier. Edits follow a step as ``position: old -> new``.
    """
    edits: dict[int, list] = {}
    for step, *edit in trace.edits:
        edits.setdefault(step, []).append(edit)
    verifies: dict[int, list[Verify]] = {}
    for verify in trace.verifies:
        verifies.setdefault(verify.step, []).append(verify)
    named = (lambda t: repr(tokenizer.decode([t]))) if tokenizer is not None else str
    lines, block = [], None
    for step, positions in enumerate(trace.order()):
        here = positions[0] // trace.block_length if positions and trace.block_length else block
        start, block = "|" if here != block else " ", here
        shown = [f"{p}{_MARKS.get(How(trace.how_of[p]), '')}" for p in positions]
        checked = "".join(f"  [verified {v.sent}, accepted {v.accepted}]" for v in verifies.get(step, ()))
        lines.append(f"step {step:4d} {start} {' '.join(shown)}{checked}")
        if tokenizer is not None and positions:
            text = tokenizer.decode([trace.first_token(p) for p in sorted(positions)])
            lines.append(f"            {text!r}")
        if step in edits:
            shown = [f"{p}: {named(old)} -> {named(new)}" for p, old, new in edits[step]]
            lines.append(f"      edits {', '.join(shown)}")
    lines += [_spent_line(lane, kinds, many=len(trace.lanes) > 1) for lane, kinds in trace.lanes.items()]
    return "\n".join(lines)


def _spent_line(lane: str, kinds: Mapping[str, Spent], many: bool) -> str:
    spent = ", ".join(f"{k} {kinds[k].forwards}" for k in KINDS if k in kinds and kinds[k].forwards)
    total = sum(s.forwards for s in kinds.values())
    return f"forwards{f' of {lane}' if many else ''}: {total} ({spent})"
