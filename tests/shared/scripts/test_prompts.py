from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.decode.calls import as_prompts
from shared.errors import UserError
from shared.scripts.prompts import as_typed, encode_prompt, read_prompt_file

IDS = [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("given_ids", "want"),
    [
        ([1, 2], [[1, 2]]),
        (IDS, IDS),
        ([[1], [2, 3, 4], []], [[1], [2, 3, 4], []]),
        (((1, 2), (3,)), [[1, 2], [3]]),
        (torch.tensor([1, 2]), [[1, 2]]),
        (torch.tensor(IDS), IDS),
        ([torch.tensor([1, 2]), torch.tensor([3])], [[1, 2], [3]]),
        (np.array([1, 2]), [[1, 2]]),
        (np.array(IDS), IDS),
        ([np.array([1, 2]), np.array([3])], [[1, 2], [3]]),
        ([np.int64(1), np.int64(2)], [[1, 2]]),
        ([], []),
    ],
    ids=[
        *("one", "two", "ragged", "tuples", "vector", "matrix", "tensors"),
        *("array", "2-d array", "arrays", "scalars", "none"),
    ],
)
def test_every_shape_of_prompts(given_ids, want):
    got = as_prompts(given_ids)
    assert got == want
    assert all(type(t) is int for row in got for t in row)


def test_the_argument_is_not_shared():
    mine = [[1, 2]]
    as_prompts(mine)[0].append(3)
    assert mine == [[1, 2]]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=4), st.booleans())
def test_padding_on_either_side_is_removed(rows, left):
    width = max(pad + n for pad, n in rows)
    want = [[10 + k] * n for k, (_, n) in enumerate(rows)]
    pad = lambda row, fill: [fill] * (width - len(row)) + row if left else row + [fill] * (width - len(row))  # noqa: E731
    ids, mask = [pad(row, 0) for row in want], [pad([1] * len(row), 0) for row in want]
    assert as_prompts(torch.tensor(ids), torch.tensor(mask)) == want
    assert as_prompts(ids, mask) == want
    assert as_prompts(np.array(ids), np.array(mask)) == want


def test_a_mask_for_one_prompt():
    assert as_prompts([7, 8, 9], [0, 1, 1]) == [[8, 9]]
    with pytest.raises(UserError, match="another shape"):
        as_prompts([[1, 2]], [[1, 1, 1]])


def file_of(tmp_path, text: str, name: str = "prompts.jsonl"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_text_file_is_one_prompt_a_line(tmp_path):
    path = file_of(tmp_path, "two plus two\n\n  \nä and {braces}\n", "prompts.txt")
    assert read_prompt_file(path) == [{"prompt": "two plus two"}, {"prompt": "ä and {braces}"}]


def test_jsonl_file(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    lines = [{"prompt": "a", "answer": 3}, {"question": "b", "id": 7}, {"messages": messages}, "c"]
    path = file_of(tmp_path, "\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert read_prompt_file(path) == [
        {"prompt": "a", "answer": 3},
        {"prompt": "b", "question": "b", "id": 7},
        {"messages": messages},
        {"prompt": "c"},
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"', r"broken JSON \(.* at column"),
        ("[1, 2]", "list found. Allowed: an object with 'prompt' or 'messages', or a string"),
        ("3", "int found"),
        ('{"text": "x"}', "no text under 'prompt' and no list under 'messages'"),
        ('{"prompt": 3}', "no text under 'prompt'"),
        ('{"messages": "x"}', "no list under 'messages'"),
        ('{"messages": []}', "no list under 'messages'"),
        ('{"messages": ["hi"]}', "message 0 is no object with texts under 'role' and 'content'"),
        ('{"messages": [{"role": "user"}]}', "message 0 is no object"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": 1, "content": "b"}]}', "message 1 is no object"),
        ('{"prompt": "fine", "messages": "x"}', "no list under 'messages'"),
        ('{"prompt": " "}', "the prompt is empty"),
        ('""', "the prompt is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = file_of(tmp_path, f'{{"prompt": "fine"}}\n\n{line}\n')
    with pytest.raises(UserError, match=rf"prompts.jsonl, line 3: .*{message}"):
        read_prompt_file(path)


def test_a_question_stands_in_for_a_prompt_that_is_null(tmp_path):
    path = file_of(tmp_path, '{"prompt": null, "question": "q"}\n')
    assert read_prompt_file(path) == [{"prompt": "q", "question": "q"}]


@pytest.mark.parametrize("text", ["a\u2028b\x85c\x0cd", "a\u2029"])
def test_only_line_feeds_end_lines(tmp_path, text):
    line = json.dumps({"prompt": text}, ensure_ascii=False)
    assert read_prompt_file(file_of(tmp_path, line + "\n")) == [{"prompt": text}]
    assert read_prompt_file(file_of(tmp_path, f"{text}\nnext", "p.txt")) == [{"prompt": text}, {"prompt": "next"}]


def test_files_of_other_editors(tmp_path):
    """A byte order mark and carriage returns are no part of a prompt."""
    for name, text in (("p.jsonl", '\ufeff{"prompt": "a"}\r\n"b"\r\n'), ("p.txt", "\ufeffa\r\nb\r\n")):
        path = tmp_path / name
        path.write_bytes(text.encode())
        assert read_prompt_file(path) == [{"prompt": "a"}, {"prompt": "b"}]


def test_files_without_a_prompt(tmp_path):
    for text in ("", "\n \n"):
        with pytest.raises(UserError, match="holds no prompt"):
            read_prompt_file(file_of(tmp_path, text))
    with pytest.raises(UserError, match=r"absent.txt' cannot be read"):
        read_prompt_file(tmp_path / "absent.txt")
    with pytest.raises(UserError, match="cannot be read"):
        read_prompt_file(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match="cannot be read"):
        read_prompt_file(tmp_path / "latin.txt")


class Letters:
    """A tokenizer of single characters that records how it was called."""

    chat_template = "<role>content"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": ([0] if add_special_tokens else []) + [ord(c) for c in text]}

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert add_generation_prompt
        assert not tokenize
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def text_of(record: dict, **flat) -> str:
    return "".join(map(chr, encode_prompt(Letters(), record, **flat)))


def test_encode_with_the_template():
    assert text_of({"prompt": "hi"}) == "<user>hi<assistant>"
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    assert text_of({"messages": messages}) == "<system>be<user>hi<assistant>"


def test_messages_beside_a_prompt_that_is_empty():
    messages = [{"role": "user", "content": "hi"}]
    for prompt in (None, "", " "):
        assert text_of({"prompt": prompt, "messages": messages}) == "<user>hi<assistant>"
    assert text_of({"prompt": "hi", "messages": []}) == "<user>hi<assistant>"


def test_encode_as_it_is():
    assert text_of({"prompt": " hi\n"}, chat=False) == " hi\n"
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    assert text_of({"messages": messages}, chat=False) == "be\nhi"


def test_no_template():
    plain = Letters()
    plain.chat_template = None
    with pytest.raises(UserError, match="no chat template; --no_chat"):
        encode_prompt(plain, {"prompt": "hi"})
    assert encode_prompt(plain, {"prompt": "hi"}, chat=False)


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_prompt_is_refused(text):
    with pytest.raises(UserError, match="the prompt is empty"):
        encode_prompt(Letters(), {"prompt": text})


def test_a_prompt_typed_in_another_locale_is_utf_8():
    assert as_typed("中文") == "中文"
    assert as_typed("中文".encode().decode("ascii", "surrogateescape")) == "中文"
    with pytest.raises(UserError, match="prompt is no UTF-8 text"):
        as_typed("a\udcff")


@pytest.mark.parametrize("line", [{"prompt": "a\ud800"}, {"messages": [{"role": "user", "content": "\udfff"}]}])
def test_half_a_character_is_refused(tmp_path, line):
    with pytest.raises(UserError, match=r"line 1: .* holds '.ud[8f]..', half a character. Allowed: Unicode text"):
        read_prompt_file(file_of(tmp_path, json.dumps(line) + "\n"))
