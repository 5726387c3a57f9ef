"""Records survive a kill, belong to one run, and are found by every process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from shared.errors import UserError
from shared.scripts.store import Store, check_writable, records_in

RUN = {"model": "m", "options": {"stopping_criteria_idx": [1]}, "prompts": [[1], [2], [3]]}


def store(folder, **more) -> Store:
    return Store(folder, "outputs", "index", **more)


def saved(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "outputs.jsonl").read_text(encoding="utf-8").split("\n") if line]


def test_records_are_appended_and_found(tmp_path):
    first = store(tmp_path / "out", run=RUN)
    assert first.found == {}
    first.append({"index": 1, "text": "ä\n\u2028"})
    assert saved(tmp_path / "out")[0] == {"index": 1, "text": "ä\n\u2028"}, "on disk at once"
    second = store(str(tmp_path / "out"), run=RUN)
    assert second.found == {1: {"index": 1, "text": "ä\n\u2028"}}
    second.append({"index": 0})
    assert [line["index"] for line in saved(tmp_path / "out")] == [1, 0]


def test_of_several_records_with_one_key_the_last_counts(tmp_path):
    with store(tmp_path) as kept:
        for text in "ab":
            kept.append({"index": 7, "text": text})
    assert store(tmp_path).found == {7: {"index": 7, "text": "b"}}


def test_half_a_last_line_is_dropped(tmp_path):
    store(tmp_path).append({"index": 0})
    with (tmp_path / "outputs.jsonl").open("a") as file:
        file.write('{"index": 1, "te')
    again = store(tmp_path)
    assert set(again.found) == {0}
    assert (tmp_path / "outputs.jsonl").read_text().endswith('"te'), (
        "looking changes nothing: its process may be writing"
    )
    again.append({"index": 1})
    assert [line["index"] for line in saved(tmp_path)] == [0, 1]


def test_without_resume_the_file_begins_anew(tmp_path):
    store(tmp_path).append({"index": 0})
    fresh = store(tmp_path, resume=False)
    assert fresh.found == {}
    assert len(saved(tmp_path)) == 1, "nothing is written before the first record"
    fresh.append({"index": 5})
    fresh.append({"index": 6})
    assert [line["index"] for line in saved(tmp_path)] == [5, 6]


def test_records_of_other_settings_are_refused(tmp_path):
    store(tmp_path, run=RUN).append({"index": 0})
    with pytest.raises(UserError, match="holds results of other settings"):
        store(tmp_path, run={**RUN, "seed": 1})
    assert len(saved(tmp_path)) == 1


def test_the_file_is_closed(tmp_path):
    with store(tmp_path, run=RUN) as kept:
        kept.append({"index": 0})
        file = kept.file
    assert file.closed
    with store(tmp_path / "none", run=RUN):
        pass
    assert not (tmp_path / "none").exists(), "nothing finished, nothing written"


def test_settings_are_there_whole_or_not_at_all(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            store(tmp_path, run=RUN).append({"index": 0})
    assert not (tmp_path / "run.json").exists()
    store(tmp_path, run=RUN).append({"index": 0})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["outputs.jsonl", "run.json"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.json", '{"a"', "run.json is damaged"),
        ("outputs.jsonl", "{\n", "outputs.jsonl is damaged"),
        ("outputs.jsonl", "{}\n", "outputs.jsonl is damaged"),
        ("outputs.rank1.jsonl", "[1]\n", "outputs.rank1.jsonl is damaged"),
    ],
)
def test_a_damaged_folder(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        store(tmp_path, run=RUN)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file"):
        store(tmp_path / "out")


def test_every_process_has_a_file_and_all_are_read(tmp_path):
    for rank in (0, 1, 10):
        with store(tmp_path, run=RUN, rank=rank) as kept:
            kept.append({"index": rank})
    (tmp_path / "outputs-of-mine.jsonl").write_text("not ours")
    assert (tmp_path / "outputs.rank10.jsonl").is_file()
    assert set(store(tmp_path, run=RUN).found) == set(records_in(tmp_path, "outputs", "index")) == {0, 1, 10}


def test_no_folder_nothing_kept():
    nowhere = store(None, run=RUN)
    nowhere.append({"index": 0})
    assert nowhere.found == {}


def test_an_output_folder_that_cannot_be_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"is under a file .*Allowed: a folder"):
        check_writable(tmp_path / "file" / "out")
    with pytest.raises(UserError, match="is a file"):
        check_writable(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        check_writable(Path("/proc/out"))
    check_writable(tmp_path / "a" / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
