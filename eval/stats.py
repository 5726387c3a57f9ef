"""The statistics of a comparison: an interval for a share, and a test of two decoders on the same problems."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, comb, log, sqrt


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

    ``p``: the chance that, were both equally good, the problems that only one solves fell as unevenly as this or more
    so (two-sided).
    """
    pairs = list(zip(first, second, strict=True))
    only_first, only_second = sum(bool(a and not b) for a, b in pairs), sum(bool(b and not a) for a, b in pairs)
    n, few = only_first + only_second, min(only_first, only_second)
    tail = sum(comb(n, k) for k in range(few + 1)) / 2**n
    return only_first, only_second, min(1.0, 2 * tail)


ONE_SIDED = 1.6448536269514722  # the normal quantile of 95 percent
CHANCE = 0.05


def loss_bound(worse: float, better: float, count: float) -> float:
    """The most that the second may lose against the first on problems like these, as a share: one-sided 95 percent
    bound of paired answers.

    ``worse``: problems that only the first solves, ``better``: only the second, of ``count``. Tango's score bound
    (1998, Statistics in Medicine 17); where no pair differs the exact one, ``1 - 0.05 ** (1 / count)``: the loss that
    would stay unseen with a chance of 5 percent.
    """
    if count == 0:
        return 1.0
    if worse == better == 0:
        return 1.0 - CHANCE ** (1.0 / count)
    low, high = (worse - better) / count, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _score(worse, better, count, middle) > -ONE_SIDED else (low, middle)
    return high


def _score(worse: float, better: float, count: float, loss: float) -> float:
    """Tango's statistic of a hypothetical loss; equations 4 and 5 of his paper in our letters."""
    a, b = 2 * count, -worse - better + (2 * count - worse + better) * loss
    c = -better * loss * (1 - loss)
    only_second = (sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    spread = count * (2 * only_second + loss * (1 - loss))
    return (worse - better - count * loss) / sqrt(spread) if spread > 0 else float("-inf")


def problems_needed(worse: int, better: int, count: int, margin: float) -> int | None:
    """How many problems would show a loss below ``margin``, were the shares as they are here; None where the loss seen
    is no smaller than that."""
    if count == 0 or (worse - better) / count >= margin:
        return None
    if worse == better == 0:
        return ceil(log(CHANCE) / log(1 - margin))
    low, high = 0, 1
    bound = lambda n: loss_bound(worse / count * n, better / count * n, n)  # noqa: E731
    while bound(high) > margin:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if bound(middle) <= margin else (middle, high)
    return high
