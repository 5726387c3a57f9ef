"""A decode as data: when, how and in which order inside its step each position was decided, and what each step cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from enum import IntEnum

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


@dataclass(frozen=True)
class Trace:
    """One text. Lists over positions run from the prompt's first token to the last decoded one, trimmed tail included.

    ``step_of``: iteration that wrote the position (-1: prompt). ``how_of``: a `How`. ``rank_of``: order inside the iteration.
    ``confidence_of``: what the drafter gave its token there. ``verified_span[s]``: length of the span verified in iteration ``s`` (0: none).
    ``accepted[s]``: how many of it were accepted. ``forwards``: passes over this row by kind, counted as if it ran alone. ``edits``: tokens replaced after they
    were decided, as ``(iteration, position, old, new)`` in order (families that edit); ``token_ids`` are the final ones.
    """

    prompt_length: int
    block_length: int
    token_ids: list[int]
    step_of: list[int]
    how_of: list[int]
    rank_of: list[int]
    confidence_of: list[float]
    verified_span: list[int]
    accepted: list[int]
    forwards: dict[str, int] = field(default_factory=dict)
    edits: list[tuple[int, int, int, int]] = field(default_factory=list)

    @property
    def total_forwards(self) -> int:
        return sum(self.forwards.values())

    @property
    def steps(self) -> int:
        return len(self.verified_span)

    @property
    def mean_accepted_length(self) -> float:
        """Accepted drafts per verify forward; 0 when nothing was verified."""
        verifies = sum(s > 0 for s in self.verified_span)
        return sum(self.accepted) / verifies if verifies else 0.0

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
        for _, position, _, _ in self.edits:
            found[How(how[position]).name.lower()] += 1
            how[position] = How.EDITED
        return {h.name.lower(): found[h.name.lower()] for h in How if found[h.name.lower()]}

    def first_token(self, position: int) -> int:
        """The token that was first decided at ``position``."""
        return next((old for _, p, old, _ in self.edits if p == position), self.token_ids[position])

    def to_json(self) -> dict:
        return {**asdict(self), "how_names": [h.name.lower() for h in How]}


def format_trace(trace: Trace, tokenizer=None) -> str:
    """The trace for people: one line a step, ``|`` where a block begins, then forwards by kind.

    Marks: plain = unmasked by the rule, ``+`` accepted, ``~`` resampled, ``-`` rejected draft kept, ``r`` ratio, ``c`` confident. Edits follow a step as
    ``position: old -> new``.
    """
    edits: dict[int, list] = {}
    for step, *edit in trace.edits:
        edits.setdefault(step, []).append(edit)
    marks = {How.ACCEPTED: "+", How.RESAMPLED: "~", How.KEPT: "-", How.RATIO: "r", How.CONFIDENT: "c"}
    lines, block = [], None
    for step, positions in enumerate(trace.order()):
        here = positions[0] // trace.block_length if positions else block
        start, block = "|" if here != block else " ", here
        shown = [f"{p}{marks.get(How(trace.how_of[p]), '')}" for p in positions]
        verified = f"  [verified {trace.verified_span[step]}, accepted {trace.accepted[step]}]"
        lines.append(f"step {step:4d} {start} {' '.join(shown)}{verified if trace.verified_span[step] else ''}")
        if tokenizer is not None and positions:
            text = tokenizer.decode([trace.first_token(p) for p in sorted(positions)])
            lines.append(f"            {text!r}")
        if step in edits:
            named = (lambda t: repr(tokenizer.decode([t]))) if tokenizer is not None else str
            shown = [f"{p}: {named(old)} -> {named(new)}" for p, old, new in edits[step]]
            lines.append(f"      edits {', '.join(shown)}")
    spent = ", ".join(f"{k} {trace.forwards[k]}" for k in KINDS if trace.forwards.get(k))
    lines.append(f"forwards: {trace.total_forwards} ({spent})")
    return "\n".join(lines)
