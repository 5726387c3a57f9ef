"""Token ids from one vocabulary to another, through text (DualDiffusion, step 3 of its pipeline)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple


def same_vocabulary(one: Any, other: Any) -> bool:
    """Do two tokenizers give every id the same token?"""
    return one is other or one.get_vocab() == other.get_vocab()


def convert_tokens(mask_a: int, mask_b: int, ids: Sequence[int], tokenizer_a: Any, tokenizer_b: Any) -> list[int]:
    """``ids`` of vocabulary a in vocabulary b. Each maximal run between masks is decoded, special tokens dropped, and encoded again without any; each mask
    becomes one mask. Lengths may change, and nothing may be left."""
    return convert_spans(mask_a, mask_b, ids, tokenizer_a, tokenizer_b).ids


class Converted(NamedTuple):
    """``ids`` in the other vocabulary, and for each of them the half-open span of those it stands for."""

    ids: list[int]
    spans: list[tuple[int, int]]

    def sources(self, rejected: Sequence[int]) -> set[int]:
        """The original places that overlap any of the ``rejected`` ones here."""
        return {place for k in rejected for place in range(*self.spans[k])}


def convert_spans(mask_a: int, mask_b: int, ids: Sequence[int], tokenizer_a: Any, tokenizer_b: Any) -> Converted:
    """`convert_tokens`, with the span of ``ids`` whose text each new token covers. A token without text has a span that covers nothing."""
    found, spans, at = [], [], 0
    for is_mask, run in groupby(ids, key=lambda i: i == mask_a):
        run = list(run)
        if is_mask:
            found += [mask_b] * len(run)
            spans += [(at + k, at + k + 1) for k in range(len(run))]
        else:
            new, parts = _through_text(run, tokenizer_a, tokenizer_b)
            found += new
            spans += [(at + first, at + last) for first, last in parts]
        at += len(run)
    return Converted(found, spans)


def _through_text(run: list[int], tokenizer_a: Any, tokenizer_b: Any) -> tuple[list[int], list[tuple[int, int]]]:
    text = tokenizer_a.decode(run, skip_special_tokens=True)
    encoded = tokenizer_b(text, add_special_tokens=False, return_offsets_mapping=True)
    # ends[k]: how many characters the first k + 1 tokens decode to. A character of several tokens belongs to all of them.
    ends = [len(tokenizer_a.decode(run[: k + 1], skip_special_tokens=True)) for k in range(len(run))]
    starts = [0, *ends[:-1]]
    spans = []
    for begin, end in encoded["offset_mapping"]:
        covered = [k for k in range(len(run)) if starts[k] < end and ends[k] > begin]
        spans.append((covered[0], covered[-1] + 1) if covered else (0, 0))
    return list(encoded["input_ids"]), spans
