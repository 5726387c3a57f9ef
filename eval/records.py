"""What is kept of a finished text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shared.output import Completion, Lossless, Sizes, Work
from shared.trace import Lanes, Spent, add_lanes


def record_of(completion: Completion, traces: bool) -> dict:
    """A text and what it cost: forwards by kind, and what each lane spent (a `shared.trace.Spent` by kind); with
    ``traces`` also how it was decoded."""
    record = {
        "text": completion.text,
        "tokens": len(completion.tokens),
        "forwards": completion.trace.forwards,
        "lanes": completion.trace.to_json()["lanes"],
        "verifies": len(completion.trace.verifies),
        "gained": completion.trace.gained,
        "seconds": completion.seconds,
    }
    return {**record, **trace_of(completion)} if traces else record


def trace_of(completion: Completion) -> dict:
    """What a comparison needs of a text's trace, position by position of the returned tokens; of each verify ``[step,
    span, accepted]`` and of each edit ``[step, position in the text, old id, new id]``."""
    trace, first = completion.trace, completion.trace.prompt_length
    part = slice(first, first + len(completion.tokens))
    return {
        "ids": completion.tokens,
        "step": trace.step_of[part],
        "how": trace.how_of[part],
        "rank": trace.rank_of[part],
        "confidence": [round(c, 4) for c in trace.confidence_of[part]],
        "verified": [[v.step, v.sent, v.accepted] for v in trace.verifies],
        "edits": [[k, p - first, old, new] for k, p, old, new in trace.edits if p < part.stop],
    }


def lanes_of(records: Iterable[Mapping]) -> dict[str, dict[str, Spent]]:
    """What each lane spent on all of them, by kind of forward."""
    found = [r.get("lanes", {}) for r in records]  # a user's own decoder tells nothing
    return add_lanes(
        [{lane: {k: Spent(**s) for k, s in kinds.items()} for lane, kinds in lanes.items()} for lanes in found]
    )


def work_of(lanes: Lanes, sizes: Mapping[str, Sizes]) -> dict[str, dict[str, Work]]:
    """What the passes of each lane must move and compute, by kind, each text as if alone (`Output.work`)."""
    return {lane: {k: sizes[lane].work(spent) for k, spent in kinds.items()} for lane, kinds in lanes.items()}


def lossless_as_json(lossless: Lossless | None) -> dict:
    """Is it, why, and relative to what? None each where nothing was decoded."""
    value, reason, to = (None,) * 3 if lossless is None else (lossless.value, lossless.reason, lossless.relative_to)
    return {"lossless": value, "lossless_reason": reason, "lossless_relative_to": to}
