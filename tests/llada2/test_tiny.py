"""The checkpoint that ships: the script's demo, exact speculation, and editing that repairs more than it harms."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import torch

import llada2
from llada2 import LLaDA2MoeModelLM, example_llada
from llada2.generate_policy_utils import generate_ssd_policy
from llada2.generate_utils import generate_cached
from llada2.options import PRESETS
from shared.network.loading import load_tokenizer
from shared.scripts.judging import meets_rules
from shared.scripts.prompts import encode_prompt

TINY = Path(llada2.__file__).parent / "tiny"
PROBLEMS = Path(__file__).parents[2] / "eval" / "tasks" / "instructions.jsonl"


@lru_cache(maxsize=1)
def model() -> LLaDA2MoeModelLM:
    return LLaDA2MoeModelLM.from_pretrained(TINY, dtype=torch.float32)


def problems(count: int) -> tuple[list[dict], list[list[int]]]:
    found = [json.loads(line) for line in PROBLEMS.read_text().splitlines()[:count]]
    return found, [encode_prompt(load_tokenizer(TINY), {"prompt": p["prompt"]}) for p in found]


def test_it_is_small():
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 5e6


def test_the_demo(capsys):
    example_llada.main(["--generate_fn", "ssd_policy", "--max_new_tokens", "24", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "lossless: yes" in out
    assert "block size one (AR)" in out


def test_speculation_is_block_size_one_in_half_the_forwards():
    _, prompts = problems(12)
    fast = generate_ssd_policy(model(), prompts, **{**PRESETS["tiny"], "max_new_tokens": 64})
    one = generate_cached(model(), prompts, block_length=1, editing_threshold=1.0, max_new_tokens=64)
    assert fast.tokens == one.tokens
    assert fast.lossless
    assert sum(fast.forwards.values()) < sum(one.forwards.values()) / 2


def test_editing_repairs_more_than_it_harms():
    """Drafts taken at a low threshold, with and without editing, at the same number of forwards."""
    found, prompts = problems(64)
    flat = {"block_length": 16, "confidence_threshold": 0.6, "max_new_tokens": 96, "tokenizer": load_tokenizer(TINY)}
    plain, edited = (generate_cached(model(), prompts, editing_threshold=t, **flat) for t in (1.0, 0.6))
    solved = [[bool(meets_rules(p["check"], t)) for p, t in zip(found, o.texts, strict=True)] for o in (plain, edited)]
    repaired = sum(after and not before for before, after in zip(*solved, strict=True))
    harmed = sum(before and not after for before, after in zip(*solved, strict=True))
    assert sum(len(c.trace.edits) for c in edited.completions) >= 20
    assert repaired >= 2 * harmed + 3
    assert edited.forwards["draft"] <= 1.05 * plain.forwards["draft"]
