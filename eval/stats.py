"""The statistics of a comparison: an interval for a share, and a test of two decoders on the same problems."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, sqrt


def wilson(right: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share ``right / count`` (Wilson 1927), by default at 95 percent; ``(0, 1)`` of nothing."""
    if count == 0:
        return 0.0, 1.0
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    # Rounding must not leave the share outside its own interval: at all or none right an end is the share itself.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, float]:
    """``(only the first is right, only the second is, p)`` over the same problems: McNemar's test in its exact form.

    ``p``: the chance that, were both equally good, the problems that only one solves fell as unevenly as this or more so (two-sided).
    """
    pairs = list(zip(first, second, strict=True))
    only_first, only_second = sum(bool(a and not b) for a, b in pairs), sum(bool(b and not a) for a, b in pairs)
    n, few = only_first + only_second, min(only_first, only_second)
    tail = sum(comb(n, k) for k in range(few + 1)) / 2**n
    return only_first, only_second, min(1.0, 2 * tail)
