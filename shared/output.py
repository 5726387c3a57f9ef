"""What every decoder returns, and what it says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from shared.trace import KINDS, Lanes, Spent, Trace, add_lanes, by_kind


@dataclass(frozen=True, slots=True)
class Lossless:
    """Does the text follow exactly the distribution (or is it the greedy text) of what it is ``relative_to``, and why or why not? Truthy if it does."""

    value: bool
    reason: str
    relative_to: str = "block size one"

    def __bool__(self) -> bool:
        return self.value

    def __str__(self) -> str:
        return f"{'yes' if self.value else 'no'} ({self.reason})"


def losslessness(broken: Mapping[str, bool], kept: str, relative_to: str = "block size one") -> Lossless:
    """Lossless unless one of the reasons in ``broken`` holds; ``kept`` says what is kept exactly."""
    reasons = [reason for reason, holds in broken.items() if holds]
    if reasons:
        return Lossless(False, "; ".join(reasons), relative_to)
    return Lossless(True, f"every token is verified: same {kept} as {relative_to}", relative_to)


class Work(NamedTuple):
    """What passes of a model must move and compute, at the least."""

    read_bytes: float = 0.0
    operations: float = 0.0

    def floor(self, read: float, rate: float) -> float:
        """Seconds at ``read`` bytes and ``rate`` operations a second."""
        return max(self.read_bytes / read, self.operations / rate)


@dataclass(frozen=True, slots=True)
class Sizes:
    """A network in numbers: weights of its ``body`` (without embedding, head and experts), its ``head``, one ``expert``; ``experts`` of them in
    a layer, ``chosen`` a token, in ``expert_layers``; cached numbers a token (``cached``), width of all queries (``queries``), bytes a number."""

    body: int
    head: int
    cached: int
    queries: int
    number_bytes: int
    expert: int = 0
    experts: int = 0
    chosen: int = 0
    expert_layers: int = 0

    def touched(self, tokens: float) -> float:
        """Experts that ``tokens`` choosing independently of each other would read in all layers; real routers read fewer."""
        if not self.expert_layers:
            return 0.0
        return self.expert_layers * self.experts * (1 - (1 - self.chosen / self.experts) ** tokens)

    def work(self, spent: Spent) -> Work:
        """Of ``spent.forwards`` passes that share their tokens evenly: weights once a pass, cached keys and values once."""
        if not spent.forwards:
            return Work()
        touched = self.touched(spent.tokens / spent.forwards) * spent.forwards
        heads = self.head * spent.forwards if spent.logits else 0
        numbers = self.body * spent.forwards + touched * self.expert + heads + self.cached * spent.context
        pairs = spent.tokens * self.chosen * self.expert_layers
        operations = 2 * (self.body * spent.tokens + self.expert * pairs + self.head * spent.logits)
        return Work(numbers * self.number_bytes, operations + 4 * self.queries * spent.pairs)


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

    ``seconds`` is wall-clock time of the whole call, prefill included; ``prefill_seconds`` is the part of it in which prompts were encoded. ``batch``: what
    the passes of each lane spent, each counted once however many texts shared it, padding included; ``lanes`` counts them per text as if each ran alone.
    ``sizes``: the network of each lane.
    """

    completions: list[Completion]
    seconds: float
    lossless: Lossless
    batch: dict[str, dict[str, Spent]] = field(default_factory=dict)
    sizes: dict[str, Sizes] = field(default_factory=dict)
    prefill_seconds: float = 0.0

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
    def lanes(self) -> Lanes:
        """What each model spent on all texts, by kind of forward, as if each ran alone."""
        return add_lanes([c.trace.lanes for c in self.completions])

    @property
    def forwards(self) -> dict[str, int]:
        """Passes by kind, per text as if it ran alone, all lanes together."""
        return dict.fromkeys(KINDS, 0) | by_kind(self.lanes)

    @property
    def batch_forwards(self) -> dict[str, int]:
        """Passes by kind, each once however many texts shared it."""
        return by_kind(self.batch)

    @property
    def batch_tokens(self) -> dict[str, int]:
        """Tokens that went through those passes, by kind, padding included."""
        total = add_lanes([{"all": kinds} for kinds in self.batch.values()]).get("all", {})
        return {kind: spent.tokens for kind, spent in total.items()}

    @property
    def forwards_per_token(self) -> float:
        return sum(self.forwards.values()) / max(1, self.token_count)

    @property
    def lane_forwards_per_token(self) -> dict[str, float]:
        """The same of each lane: passes of a small drafter and of a large target are not one number."""
        return {
            lane: sum(s.forwards for s in kinds.values()) / max(1, self.token_count)
            for lane, kinds in self.lanes.items()
        }

    @property
    def tokens_per_second(self) -> float:
        return self.token_count / max(self.seconds, 1e-9)

    @property
    def verifies(self) -> int:
        return sum(len(c.trace.verifies) for c in self.completions)

    @property
    def accepted_per_verify(self) -> float:
        """Accepted drafts per verify, over all completions; 0 when nothing was verified."""
        accepted = sum(v.accepted for c in self.completions for v in c.trace.verifies)
        return accepted / self.verifies if self.verifies else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens that a verify brings: accepted drafts, and the verifier's own token (Leviathan et al. 2023; tau in later papers)."""
        return sum(c.trace.gained for c in self.completions) / self.verifies if self.verifies else 0.0

    def work(self) -> dict[str, dict[str, Work]]:
        """What each lane's passes must move and compute, by kind, each text as if it ran alone."""
        return {
            lane: {kind: self.sizes[lane].work(spent) for kind, spent in kinds.items()}
            for lane, kinds in self.lanes.items()
        }

    def floor_seconds_per_token(self, read: float, rate: float) -> float:
        """The least time a token takes on a machine that reads ``read`` bytes and does ``rate`` operations a second, over all lanes."""
        seconds = sum(work.floor(read, rate) for kinds in self.work().values() for work in kinds.values())
        return seconds / max(1, self.token_count)

    def summary(self) -> dict:
        """The figures every table of this repository is made of, as JSON data."""
        return {
            "texts": len(self.completions),
            "tokens": self.token_count,
            "seconds": round(self.seconds, 4),
            "tokens_per_second": round(self.tokens_per_second, 2),
            "forwards": self.forwards,
            "forwards_per_token": round(self.forwards_per_token, 4),
            "lane_forwards_per_token": {lane: round(n, 4) for lane, n in self.lane_forwards_per_token.items()},
            "work": {lane: {k: w._asdict() for k, w in kinds.items()} for lane, kinds in self.work().items()},
            "batch_forwards": self.batch_forwards,
            "accepted_per_verify": round(self.accepted_per_verify, 3),
            "mean_acceptance_length": round(self.mean_acceptance_length, 3),
            "lossless": self.lossless.value,
            "lossless_reason": self.lossless.reason,
            "lossless_relative_to": self.lossless.relative_to,
        }
