"""What is kept of a finished text."""

from __future__ import annotations

from shared.output import Completion


def record_of(completion: Completion, traces: bool) -> dict:
    """A text and what it cost; with ``traces`` also how it was decoded."""
    record = {
        "text": completion.text,
        "tokens": len(completion.tokens),
        "forwards": dict(completion.trace.forwards),
        "seconds": completion.seconds,
    }
    return {**record, **trace_of(completion)} if traces else record


def trace_of(completion: Completion) -> dict:
    """What a comparison needs of a text's trace, position by position of the returned tokens; of each verify ``[step, span, accepted]`` and of each
    edit ``[step, position in the text, old id, new id]``."""
    trace, first = completion.trace, completion.trace.prompt_length
    part = slice(first, first + len(completion.tokens))
    return {
        "ids": completion.tokens,
        "step": trace.step_of[part],
        "how": trace.how_of[part],
        "rank": trace.rank_of[part],
        "confidence": [round(c, 4) for c in trace.confidence_of[part]],
        "verified": [[k, s, a] for k, (s, a) in enumerate(zip(trace.verified_span, trace.accepted, strict=True)) if s],
        "edits": [[k, p - first, old, new] for k, p, old, new in trace.edits if p < part.stop],
    }
