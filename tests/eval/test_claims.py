"""Results are never lost: folders with dots, runs on results, two runs at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from eval import compare
from eval.__main__ import predictions_of
from eval.model import DraftAndVerifyLM
from shared.errors import UserError
from shared.scripts.claims import check_fresh, claim, release

TINY = str(Path(__file__).parents[2] / "SDAR" / "tiny")
HOLDER = "import sys; from shared.scripts.claims import claim; claim(sys.argv[1]); print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def held(tmp_path):
    """A folder that another process works in."""
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    yield tmp_path, other
    other.kill()
    other.communicate()


def test_a_dot_in_an_output_path_is_no_suffix():
    places = [predictions_of(f"O/{name}") for name in ("thr0.85", "thr0.9", "thr0", "run.json", "run")]
    assert places == [Path(f"O/{name}/predictions") for name in ("thr0.85", "thr0.9", "thr0", "run", "run")]


def test_a_run_without_resume_does_not_write_over_results(tmp_path):
    kept = tmp_path / "predictions.rank1.jsonl"
    kept.write_text('{"key": "k"}\n')
    with pytest.raises(UserError, match=r"holds results \(predictions.rank1.jsonl\)\. Allowed: --resume"):
        DraftAndVerifyLM(pretrained=TINY, predictions=str(tmp_path))
    assert kept.read_text() == '{"key": "k"}\n'
    assert DraftAndVerifyLM(pretrained=TINY, predictions=str(tmp_path), resume=True)._store.found == {"k": {"key": "k"}}
    check_fresh(tmp_path / "new", "predictions")
    release(tmp_path)


def test_two_runs_do_not_share_a_folder(held):
    folder, other = held
    for run in (
        lambda: DraftAndVerifyLM(pretrained=TINY, predictions=str(folder), resume=True),
        lambda: compare.main(["--run", "family=SDAR", "--tasks", "instructions", "--output", str(folder)]),
    ):
        with pytest.raises(UserError, match="is in use by another run"):
            run()
    other.kill()
    other.wait()
    claim(folder)  # what a killed run held is free
    claim(folder)
    release(folder)


def test_a_run_of_several_processes_holds_its_folder_until_the_last_ends(tmp_path):
    program = (
        "import sys; from shared.scripts.claims import claim, join; {}; print('held', flush=True); sys.stdin.read()"
    )
    running = []
    for how in ("claim(sys.argv[1], several=True)", "join(sys.argv[1])"):
        call = [sys.executable, "-c", program.format(how), str(tmp_path)]
        running.append(subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert running[-1].stdout.readline() == "held\n"
    for process in running:
        with pytest.raises(UserError, match="is in use by another run"):
            claim(tmp_path)
        process.kill()
        process.communicate()
    claim(tmp_path)
    release(tmp_path)


def test_a_folder_that_cannot_be_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("eval.model.load_models", lambda *a, **k: pytest.fail("loaded"))
    for place in (tmp_path / "file", tmp_path / "file" / "under"):
        with pytest.raises(UserError, match="output folder"):
            DraftAndVerifyLM(pretrained=TINY, predictions=str(place))
