"""Files are refused before the work, and whole after a full disk."""

from __future__ import annotations

import json
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

from shared.errors import UserError
from shared.scripts.files import check_file, write_whole
from shared.scripts.store import Store, records_in


@contextmanager
def room_for(size: int):
    """No file may grow beyond ``size`` bytes, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"json '.*' is a folder. Allowed: a file"):
        check_file("json", tmp_path)
    with pytest.raises(UserError, match=r"is a file\. Allowed: a folder"):
        check_file("json", tmp_path / "file" / "x.json")
    with pytest.raises(UserError, match="is under a file"):
        check_file("json", tmp_path / "file" / "under" / "x.json")
    with pytest.raises(UserError, match="cannot be written"):
        check_file("json", "/proc/none/x.json")
    check_file("json", tmp_path / "none" / "x.json")
    check_file("json", "/dev/null")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = tmp_path / "results.json"
    write_whole(path, "before")
    with room_for(1000), pytest.raises(OSError, match="File too large"):
        write_whole(path, "x" * 2000)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    write_whole("/dev/null", "x")
    assert Path("/dev/null").is_char_device()


def test_records_on_a_full_disk_are_whole_and_go_on(tmp_path):
    run = {"seed": 1}
    kept = Store(tmp_path, "outputs", "index", run=run)
    with room_for(1000):
        for index in range(3):
            kept.append({"index": index, "text": "x" * 280})
        with pytest.raises(
            UserError, match=r"takes no more \(File too large\). What is there is whole: the same command"
        ):
            kept.append({"index": 3, "text": "x" * 280})
    kept.close()
    assert (tmp_path / "outputs.jsonl").read_bytes().endswith(b'"}\n')
    again = Store(tmp_path, "outputs", "index", run=run)
    assert sorted(again.found) == [0, 1, 2]
    again.append({"index": 3})
    assert sorted(records_in(tmp_path, "outputs", "index")) == [0, 1, 2, 3]


def test_half_a_character_is_kept_as_a_question_mark(tmp_path):
    with Store(tmp_path, "outputs", "index") as kept:
        kept.append({"index": 0, "text": "a\ud800b ä"})
    assert json.loads((tmp_path / "outputs.jsonl").read_text(encoding="utf-8"))["text"] == "a?b ä"
