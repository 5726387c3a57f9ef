"""A decode as data: when, how and in which order inside its step each position was decided, and what each step cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field

from shared.draft import How

KINDS = ("prefill", "draft", "verify", "commit")


@dataclass(frozen=True)
class Trace:
    """One text. Lists over positions run from the prompt's first token to the last decoded one, trimmed tail included.

    ``step_of``: iteration that wrote the position (-1: prompt). ``how_of``: a `How`. ``rank_of``: order inside the iteration.
    ``confidence_of``: what the drafter gave its token there. ``verified_span[s]``: length of the span verified in iteration ``s`` (0: none).
    ``accepted[s]``: how many of it were accepted. ``forwards``: passes over this row by kind, counted as if it ran alone.
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

    def to_json(self) -> dict:
        return {**asdict(self), "how_names": [h.name.lower() for h in How]}


def format_trace(trace: Trace, tokenizer=None) -> str:
    """The trace for people: one line a step, ``|`` where a block begins, then forwards by kind.

    Marks: plain = unmasked by the rule, ``+`` accepted, ``~`` resampled, ``-`` rejected draft kept, ``r`` ratio, ``c`` confident.
    """
    marks = {How.ACCEPTED: "+", How.RESAMPLED: "~", How.KEPT: "-", How.RATIO: "r", How.CONFIDENT: "c"}
    lines, block = [], None
    for step, positions in enumerate(trace.order()):
        here = positions[0] // trace.block_length if positions else block
        start, block = "|" if here != block else " ", here
        shown = [f"{p}{marks.get(How(trace.how_of[p]), '')}" for p in positions]
        verified = f"  [verified {trace.verified_span[step]}, accepted {trace.accepted[step]}]"
        lines.append(f"step {step:4d} {start} {' '.join(shown)}{verified if trace.verified_span[step] else ''}")
        if tokenizer is not None:
            text = tokenizer.decode([trace.token_ids[p] for p in sorted(positions)])
            lines.append(f"            {text!r}")
    spent = ", ".join(f"{k} {trace.forwards[k]}" for k in KINDS if trace.forwards.get(k))
    lines.append(f"forwards: {trace.total_forwards} ({spent})")
    return "\n".join(lines)
