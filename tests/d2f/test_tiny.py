"""The checkpoints that ship: the script's demo, exact speculation on both backends, and what an adapter gives."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import d2f
from d2f import example_d2f
from d2f.generation_utils import generate_block_single, generate_block_speculative
from d2f.modeling_d2f import BACKENDS
from d2f.options import PLAIN_PRESETS, PRESETS
from shared.network.loading import load_tokenizer
from shared.scripts.judging import is_solved, meets_rules
from shared.scripts.prompts import encode_prompt, read_prompt_file

TINY = Path(d2f.__file__).parent / "tiny"
PROBLEMS = Path(__file__).parents[2] / "eval" / "tasks" / "instructions.jsonl"
NAMES = list(BACKENDS)
ONE = {"block_length": 1, "block_add_threshold": 1.0, "max_new_tokens": 64}


@lru_cache(maxsize=4)
def model(name: str, adapter: bool = True):
    folder = TINY / name
    return BACKENDS[name].from_pretrained(folder, adapter=folder / "adapter" if adapter else None, dtype=torch.float32)


def problems(name: str, count: int) -> tuple[list[dict], list[list[int]]]:
    found = [json.loads(line) for line in PROBLEMS.read_text().splitlines()[:count]]
    return found, [encode_prompt(load_tokenizer(TINY / name), {"prompt": p["prompt"]}) for p in found]


def test_they_are_small():
    """Weights of both backends together."""
    assert sum(file.stat().st_size for file in TINY.rglob("*.safetensors")) < 6e6


@pytest.mark.parametrize("name", NAMES)
def test_the_demo(capsys, name):
    argv = ["--model", name, "--generate_fn", "ssd", "--max_new_tokens", "24", "--device", "cpu"]
    example_d2f.main(argv)
    out = capsys.readouterr().out
    assert "lossless: yes" in out
    assert "block size one (AR)" in out


@pytest.mark.parametrize("name", NAMES)
def test_the_problems_of_the_demo_are_solved(name):
    records, tokenizer = read_prompt_file(TINY / name / "demo.jsonl"), load_tokenizer(TINY / name)
    prompts = [encode_prompt(tokenizer, record) for record in records]
    out = generate_block_speculative(model(name), prompts, tokenizer=tokenizer, **PRESETS["tiny"])
    assert [is_solved(r, c.text) for r, c in zip(records, out.completions, strict=True)] == [True] * 6


@pytest.mark.parametrize("name", NAMES)
def test_speculation_is_block_size_one_in_a_third_of_the_forwards(name):
    _, prompts = problems(name, 12)
    fast = generate_block_speculative(model(name), prompts, **{**PRESETS["tiny"], "max_new_tokens": 64})
    one = generate_block_single(model(name), prompts, **ONE)
    assert fast.tokens == one.tokens
    assert fast.lossless
    assert sum(fast.forwards.values()) < sum(one.forwards.values()) / 3


@pytest.mark.parametrize("name", NAMES)
def test_several_blocks_in_flight_take_fewer_forwards_than_one(name):
    """Plain and speculative; of the latter no text changes."""
    _, prompts = problems(name, 12)
    for generate, preset in ((generate_block_single, PLAIN_PRESETS["tiny"]), (generate_block_speculative, PRESETS["tiny"])):  # fmt: skip
        several, alone = (
            generate(model(name), prompts, **{**preset, "block_length": 8, "block_add_threshold": add, "max_new_tokens": 64})
            for add in (0.1, 1.0)
        )  # fmt: skip
        assert sum(several.forwards.values()) < 0.95 * sum(alone.forwards.values())
    assert several.tokens == alone.tokens


@pytest.mark.parametrize("name", NAMES)
def test_the_adapter_teaches_the_base_to_see_blocks(name):
    """Plain decoding of more instructions is right with it than without."""
    found, prompts = problems(name, 32)
    flat = {**PLAIN_PRESETS["tiny"], "max_new_tokens": 64, "tokenizer": load_tokenizer(TINY / name)}
    solved = [
        sum(bool(meets_rules(p["check"], t)) for p, t in zip(found, generate_block_single(model(name, adapter), prompts, **flat).texts, strict=True))
        for adapter in (True, False)
    ]  # fmt: skip
    assert solved[0] >= 20
    assert solved[0] > solved[1]
