"""Exact decoding against block size one where models are sure of themselves: shipped checkpoints, and random networks made sharp.

Random networks are hardly ever confident, so a rule that lets confident drafts pass unverified would break nothing in a test on them. Trained ones are
confident nearly always, and wrong now and then; sharp random ones are always confident and mostly wrong.
"""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from shared.family import FAMILIES
from shared.network.loading import load_tokenizer
from shared.scripts.prompts import encode_prompt
from shared.trace import How

TASKS = Path(__file__).parents[1] / "eval" / "tasks"
PROBLEMS = 3  # a task
NEW_TOKENS = 96


@lru_cache(maxsize=1)
def shipped(family: str):
    folder = FAMILIES[family].tiny
    return FAMILIES[family].networks["model"].model_class.from_pretrained(folder, dtype=torch.float32)


@lru_cache(maxsize=1)
def prompts(family: str) -> list[list[int]]:
    tokenizer = load_tokenizer(FAMILIES[family].tiny)
    tasks = ("word_problems", "functions", "instructions")
    lines = [line for task in tasks for line in (TASKS / f"{task}.jsonl").read_text().splitlines()[:PROBLEMS]]
    return [encode_prompt(tokenizer, {"prompt": json.loads(line)["prompt"]}) for line in lines]


def decode(family: str, model, ids, setting, **more):
    decoder = FAMILIES[family].decoders[setting.decoder]
    return decoder.generate(model, ids, **{**setting.options, "max_new_tokens": NEW_TOKENS, **more})


@lru_cache(maxsize=1)
def one_by_one(family: str) -> list[list[int]]:
    return decode(family, shipped(family), prompts(family), FAMILIES[family].baseline).tokens


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("block_length", [8, 16, 32])
def test_shipped_checkpoints(family, block_length):
    out = decode(family, shipped(family), prompts(family), FAMILIES[family].exact, block_length=block_length)
    assert out.lossless
    assert out.tokens == one_by_one(family)
    sure = [c for text in out.completions for c in text.trace.confidence_of if c > 0.999]
    assert len(sure) > out.token_count / 2, "most drafts are certain"


def sharp(family: str):
    """A random network of the family's shipped shape whose logits are far apart."""
    model = copy.deepcopy(shipped(family)).double()
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.copy_(0.08 * torch.randn(weight.shape))
    model.lm_head.weight.mul_(500)
    return model


@pytest.mark.parametrize("family", list(FAMILIES))
def test_sharp_random_networks(family):
    """Every draft is certain, and most are rejected."""
    model, ids = sharp(family), [prompt[:30] for prompt in prompts(family)[::2]]
    short = {"max_new_tokens": 32, "stopping_criteria_idx": ()}
    out = decode(family, model, ids, FAMILIES[family].exact, block_length=8, **short)
    assert out.lossless
    assert out.tokens == decode(family, model, ids, FAMILIES[family].baseline, **short).tokens
    decided = [(h, c) for t in out.completions for h, c in zip(t.trace.how_of, t.trace.confidence_of, strict=True)]
    rejected = [confidence for how, confidence in decided if how == How.RESAMPLED]
    assert len(rejected) > 20
    assert sum(c > 0.999 for c in rejected) > 0.9 * len(rejected)
