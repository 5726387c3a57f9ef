"""The shared tokenizer: exact round trips, digits apart, ChatML, the same files for everyone."""

from __future__ import annotations

from functools import lru_cache
from itertools import islice

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from shared.network.loading import load_tokenizer
from tests.train.shipped import TINY
from train.tasks import train_problems
from train.tokenizer import SPECIAL, build_tokenizer, chat_prompt, save_tokenizer


@lru_cache(maxsize=1)
def _tokenizer():
    return load_tokenizer(TINY)


@given(st.text())
@example("  logit_rows, double  and trailing  ")
@example("don't stop \u00e9\u4e2d\U0001f600\u0301\r\n\t\x00")
@example("<|im_start|>user\nhi<|im_end|>")
def test_any_string_comes_back(text):
    tokenizer = _tokenizer()
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@given(st.text(alphabet="0123456789 ax.=", min_size=1))
def test_every_digit_is_one_token(text):
    tokenizer = _tokenizer()
    pieces = [tokenizer.decode([i]) for i in tokenizer(text).input_ids]
    assert [p for p in pieces if any(c.isdigit() for c in p)] == [c for c in text if c.isdigit()]


def test_special_tokens():
    tokenizer = _tokenizer()
    assert len(tokenizer) == 1024
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.mask_token == "<|MASK|>"
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == [1020, 1021, 1022, 1023]
    assert tokenizer.decode([1023, *tokenizer("hi").input_ids, 1022], skip_special_tokens=True) == "hi"


def test_chat_template_is_what_training_shows():
    tokenizer = _tokenizer()
    turns = [{"role": "user", "content": "What is 2+2?"}]
    shown = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert shown == chat_prompt("What is 2+2?") == "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    turns = [{"role": "system", "content": "a"}, *turns, {"role": "assistant", "content": "4"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False).endswith("<|im_start|>assistant\n4<|im_end|>\n")
    assert tokenizer.apply_chat_template(turns, tokenize=False).startswith("<|im_start|>system\na<|im_end|>\n")


def test_tasks_are_short_in_it():
    """Prompts and solutions of the tasks take few enough tokens for the positions the checkpoints know."""
    tokenizer = _tokenizer()
    lengths = [len(tokenizer(chat_prompt(p.prompt) + p.solution).input_ids) for p in islice(train_problems(), 500)]
    assert sum(lengths) / len(lengths) < 140
    assert max(lengths) < 256


def test_built_on_few_texts_and_saved(tmp_path):
    tokenizer = build_tokenizer(["some words and 12 numbers"] * 50, vocab_size=300)
    save_tokenizer(tokenizer, tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("words 12 <|MASK|>").input_ids == tokenizer("words 12 <|MASK|>").input_ids
    assert loaded.chat_template == tokenizer.chat_template


@pytest.mark.slow
def test_the_shipped_one_is_what_the_recipe_builds():
    assert build_tokenizer().get_vocab() == _tokenizer().get_vocab()
