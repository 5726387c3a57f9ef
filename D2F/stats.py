"""The statistics that the published decoders return, from a trace."""

from __future__ import annotations

from itertools import pairwise

from shared.trace import How, Pass, Trace

_CODES = {
    How.UNMASKED: lambda p: p,
    How.ACCEPTED: lambda p: p,
    How.RATIO: lambda p: p,
    How.CONFIDENT: lambda p: p,
    How.RESAMPLED: lambda p: p + 0.5,
    How.FORCED: lambda p: -p,
}


def decoding_order(trace: Trace) -> list[list[float]]:
    """Positions by step: ``+`` by confidence or accepted, ``+ 0.5`` resampled, ``-`` forced."""
    return [[_CODES[How(trace.how_of[p])](p) for p in step] for step in trace.order()]


def forward_stats(trace: Trace) -> dict:
    """The published keys. Blocks are numbered from 1, the prompt is 0; ``total_forwards`` counts drafts and verifies, ``per_block_forwards`` drafts alone.
    ``avg_active_blocks_per_step`` looks at each step before a block is added, and at the one that finds nothing left."""
    length, passes, total = trace.block_length, trace.passes, trace.total_forwards
    blocks = -(-(passes[-1].end - trace.prompt_length) // length) if passes else 0
    per_block = (
        {block: sum(_overlaps(trace, p, block) for p in passes) for block in range(blocks + 1)} if passes else {}
    )
    own = [count for block, count in per_block.items() if block]
    active = [-(-(p.end - p.first) // length) for p in passes]
    ends = [trace.prompt_length, *(p.end for p in passes)]
    added = [later > earlier for earlier, later in pairwise(ends)]
    before = [a - new for a, new in zip(active, added, strict=True)]
    return {
        "per_block_forwards": per_block,
        "average_forwards_excluding_prompt": sum(own) / len(own) if own else 0.0,
        "total_forwards": total,
        "avg_forwards_per_block": total / max(1, blocks),
        "avg_active_blocks_per_forward": sum(active) / max(1, total),
        "avg_active_blocks_per_step": sum(before) / (len(passes) + 1),
        "avg_forwarded_blocks_per_forward": sum((p.end - p.start) // length for p in passes) / max(1, total),
        "decoding_order": decoding_order(trace),
    }


def _overlaps(trace: Trace, drafted: Pass, block: int) -> bool:
    """Does a draft go over a block?"""
    if block == 0:
        return drafted.start < trace.prompt_length
    begin = trace.prompt_length + (block - 1) * trace.block_length
    return drafted.start < begin + trace.block_length and begin < drafted.end


def format_stats(trace: Trace) -> str:
    """The same for people, as the published script prints it."""
    stats = forward_stats(trace)
    lines = [
        f"[stats] total_forwards: {stats['total_forwards']}",
        f"[stats] avg_forwards_per_block: {stats['avg_forwards_per_block']:.3f}",
        f"[stats] blockwise_avg_forwards: {stats['average_forwards_excluding_prompt']:.3f}",
        f"[stats] per_block_forwards: {', '.join(f'{k}:{v}' for k, v in stats['per_block_forwards'].items())}",
    ]
    names = ("avg_active_blocks_per_forward", "avg_active_blocks_per_step", "avg_forwarded_blocks_per_forward")
    return "\n".join(lines + [f"[stats] {name}: {stats[name]:.3f}" for name in names])
