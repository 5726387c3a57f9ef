"""What every decoder returns."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from shared.trace import KINDS, Trace


class Lossless(NamedTuple):
    """Whether the text follows exactly the law (or the greedy text) of block-size-one decoding, and why or why not."""

    lossless: bool
    reason: str


@dataclass(frozen=True)
class Completion:
    """One prompt's result. ``tokens`` are the returned ids without the prompt; ``seconds`` run from its prefill to its last block."""

    request: int
    tokens: list[int]
    trace: Trace
    seconds: float
    uniforms_used: int
    text: str | None = None


@dataclass(frozen=True)
class Output:
    """All completions of one call, in the order of the prompts.

    ``seconds`` is wall-clock time of the whole call, prefill included; ``prefill_seconds`` is the part of it in which prompts were encoded. ``batch_forwards`` counts passes of the model by kind,
    each once however many rows shared it; ``forwards`` counts them per row as if each ran alone. ``batch_tokens`` are the tokens that
    went through those passes, padding included.
    """

    completions: list[Completion]
    seconds: float
    batch_forwards: dict[str, int]
    lossless: bool
    lossless_reason: str
    prefill_seconds: float = 0.0
    batch_tokens: dict[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> list[list[int]]:
        return [c.tokens for c in self.completions]

    @property
    def texts(self) -> list[str | None]:
        return [c.text for c in self.completions]

    @property
    def token_count(self) -> int:
        return sum(len(c.tokens) for c in self.completions)

    @property
    def forwards(self) -> dict[str, int]:
        total = Counter()
        for c in self.completions:
            total.update(c.trace.forwards)
        return {k: total[k] for k in KINDS}

    @property
    def forwards_per_token(self) -> float:
        return sum(self.forwards.values()) / max(1, self.token_count)

    @property
    def tokens_per_second(self) -> float:
        return self.token_count / max(self.seconds, 1e-9)

    @property
    def mean_accepted_length(self) -> float:
        """Accepted drafts per verify forward, over all completions."""
        accepted = sum(sum(c.trace.accepted) for c in self.completions)
        verifies = sum(s > 0 for c in self.completions for s in c.trace.verified_span)
        return accepted / verifies if verifies else 0.0

    def summary(self) -> dict:
        """The figures every table of this repository is made of, as JSON data."""
        return {
            "texts": len(self.completions),
            "tokens": self.token_count,
            "seconds": round(self.seconds, 4),
            "tokens_per_second": round(self.tokens_per_second, 2),
            "forwards": self.forwards,
            "forwards_per_token": round(self.forwards_per_token, 4),
            "batch_forwards": self.batch_forwards,
            "accepted_length": round(self.mean_accepted_length, 3),
            "lossless": self.lossless,
            "lossless_reason": self.lossless_reason,
        }
