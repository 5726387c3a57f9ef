"""Figures of texts and runs. Pure functions of lists; what needs a model is in `likelihood`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from math import log2, sqrt
from pathlib import Path
from statistics import mean, pvariance, stdev

import torch
from scipy.stats import t as student

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def accuracy(predictions: Sequence, references: Sequence) -> float:
    """The share of predictions that are their reference; 0 of none."""
    pairs = list(zip(predictions, references, strict=True))
    return sum(p == r for p, r in pairs) / len(pairs) if pairs else 0.0


def confidence_interval(data: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """``(mean, margin)``: Student's interval of the mean is ``mean - margin`` to ``mean + margin``. One number has no margin: infinite."""
    if len(data) < 2:
        return (data[0], float("inf")) if data else (0.0, float("inf"))
    error = stdev(data) / sqrt(len(data))
    return mean(data), float(student.ppf((1 + confidence) / 2, len(data) - 1)) * error


def ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Every run of ``n`` words."""
    return zip(*(words[k:] for k in range(n)), strict=False)


def distinct_n(samples: Sequence[str], n: int) -> float:
    """Different n-grams of words over all n-grams, pooled over ``samples``; 0 where there are none."""
    found = list(chain.from_iterable(ngrams(sample.split(), n) for sample in samples))
    return len(set(found)) / len(found) if found else 0.0


def token_entropy(samples: Sequence[str]) -> float:
    """Entropy in bits of the words of all ``samples`` together."""
    counts = Counter(chain.from_iterable(sample.split() for sample in samples))
    total = counts.total()
    return -sum(c / total * log2(c / total) for c in counts.values())


def jaccard(first: str, second: str) -> float:
    """Shared words over all words of two texts; 0 where neither has one."""
    one, other = set(first.split()), set(second.split())
    return len(one & other) / len(one | other) if one | other else 0.0


def prompt_sensitivity(groups: Sequence[Sequence[str]]) -> tuple[float, float]:
    """``(mean, population variance)`` over groups of how much the outputs of a prompt's variants resemble that of the first variant: the mean Jaccard
    similarity. A group of one says nothing and is left out."""
    found = [mean(jaccard(group[0], other) for other in group[1:]) for group in groups if len(group) > 1]
    return (mean(found), pvariance(found)) if found else (0.0, 0.0)


def self_bleu(samples: Sequence[str]) -> float | None:
    """Sacrebleu's sentence BLEU of each sample against all others, 0 to 100, as a mean: high where samples are alike. None of fewer than two."""
    from sacrebleu.metrics import BLEU

    if len(samples) < 2:
        return None
    bleu = BLEU(effective_order=True)
    others = [[*samples[:k], *samples[k + 1 :]] for k in range(len(samples))]
    return mean(bleu.sentence_score(s, o).score for s, o in zip(samples, others, strict=True))


def flops_estimate(parameters: int, forwards: float) -> float:
    """``2 * parameters * forwards``: operations for each position of the text, since a forward goes over all of them."""
    return 2.0 * parameters * forwards


class Peak:
    """Bytes, once `peak_memory` is over; None where they cannot be had."""

    bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """The most memory in use inside: of the GPU, or of this process where ``device`` is the CPU (Linux)."""
    peak, cuda = Peak(), device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    known = cuda or _forget_peak()
    yield peak
    if known:
        peak.bytes = torch.cuda.max_memory_allocated(device) if cuda else _resident_peak()


def _forget_peak() -> bool:
    """Let the kernel count the peak of this process anew. Can it?"""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _resident_peak() -> int | None:
    found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())
    return int(found[1]) * 1024 if found else None
