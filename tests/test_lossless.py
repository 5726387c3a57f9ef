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
from shared.scripts.models import load_models, other_models
from shared.scripts.prompts import encode_prompt
from shared.trace import How

TASKS = Path(__file__).parents[1] / "eval" / "tasks"
PROBLEMS = 3  # a task
NEW_TOKENS = 96


CHECKPOINTS = [(family, name) for family in FAMILIES for name in FAMILIES[family].shipped]


@lru_cache(maxsize=1)
def shipped(family: str, name: str):
    """The networks of a shipped checkpoint by role, adapters in them."""
    return load_models(FAMILIES[family], FAMILIES[family].checkpoints(name), dtype=torch.float32)


def first(family: str, name: str):
    return shipped(family, name)[FAMILIES[family].first]


@lru_cache(maxsize=1)
def prompts(family: str, name: str) -> list[list[int]]:
    tokenizer = load_tokenizer(first(family, name).folder)
    tasks = ("word_problems", "functions", "instructions")
    lines = [line for task in tasks for line in (TASKS / f"{task}.jsonl").read_text().splitlines()[:PROBLEMS]]
    return [encode_prompt(tokenizer, {"prompt": json.loads(line)["prompt"]}) for line in lines]


def decode(family: str, name: str, ids, setting, model=None, **more):
    decoder, others = FAMILIES[family].decoders[setting.decoder], {}
    if model is None:
        model, others = first(family, name), other_models(FAMILIES[family], setting.decoder, shipped(family, name))
    return decoder.generate(model, ids, **{**setting.options, "max_new_tokens": NEW_TOKENS, **others, **more})


@pytest.mark.parametrize(("family", "name"), CHECKPOINTS)
def test_shipped_checkpoints(family, name):
    ids = prompts(family, name)
    one_by_one = decode(family, name, ids, FAMILIES[family].baseline).tokens
    for block_length in (8, 16, 32):
        out = decode(family, name, ids, FAMILIES[family].exact, block_length=block_length)
        assert out.lossless, block_length
        assert out.tokens == one_by_one, block_length
        sure = [c for text in out.completions for c in text.trace.confidence_of if c > 0.999]
        assert len(sure) > out.token_count / 2, f"most drafts are certain, blocks of {block_length}"


def test_adapters_are_in_what_is_tested():
    laid_on = [c for c in CHECKPOINTS if len(FAMILIES[c[0]].shipped[c[1]]) > len(shipped(*c))]
    assert ("D2F", "llada") in laid_on
    assert all(first(*c).adapter is not None for c in laid_on)


def sharp(family: str, name: str):
    """A random network of the shape of a shipped one whose logits are far apart."""
    model = copy.deepcopy(first(family, name)).double()
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.copy_(0.08 * torch.randn(weight.shape))
    model.lm_head.weight.mul_(1000)
    return model


@pytest.mark.parametrize(("family", "name"), CHECKPOINTS)
def test_sharp_random_networks(family, name):
    """Every draft is certain, and most are rejected."""
    model, ids = sharp(family, name), [prompt[:30] for prompt in prompts(family, name)[::2]]
    short = {"max_new_tokens": 32, "stopping_criteria_idx": ()}
    out = decode(family, name, ids, FAMILIES[family].exact, model, block_length=8, **short)
    assert out.lossless
    assert out.tokens == decode(family, name, ids, FAMILIES[family].baseline, model, **short).tokens
    decided = [(h, c) for t in out.completions for h, c in zip(t.trace.how_of, t.trace.confidence_of, strict=True)]
    rejected = [confidence for how, confidence in decided if how == How.RESAMPLED]
    assert len(rejected) > 20
    assert sum(c > 0.999 for c in rejected) > 0.9 * len(rejected)
