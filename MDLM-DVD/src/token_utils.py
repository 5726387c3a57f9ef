"""Token ids from one vocabulary to another, through text (DualDiffusion, step 3 of its pipeline)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any


def same_vocabulary(one: Any, other: Any) -> bool:
    """Do two tokenizers give every id the same token?"""
    return one is other or one.get_vocab() == other.get_vocab()


def convert_tokens(mask_a: int, mask_b: int, ids: Sequence[int], tokenizer_a: Any, tokenizer_b: Any) -> list[int]:
    """``ids`` of vocabulary a in vocabulary b. Each maximal run between masks is decoded, special tokens dropped, and encoded again without any; each mask
    becomes one mask. Lengths may change, and nothing may be left."""
    found: list[int] = []
    for is_mask, run in groupby(ids, key=lambda i: i == mask_a):
        run = list(run)
        text = "" if is_mask else tokenizer_a.decode(run, skip_special_tokens=True)
        found += [mask_b] * len(run) if is_mask else tokenizer_b(text, add_special_tokens=False)["input_ids"]
    return found
