"""`python -m eval.docs`: one command for every table of every README."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from eval import docs
from eval.docs import flags_table, refreshed
from shared.errors import UserError
from shared.options import Blocks, FlatOptions, Unmask

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Options(FlatOptions):
    blocks: Blocks = field(default_factory=Blocks)
    unmask: Unmask = field(default_factory=Unmask)


def test_a_table_has_every_flag_with_its_other_names_and_choices():
    lines = flags_table(Options).splitlines()
    assert lines[:3] == ["| flag | default | meaning |", "|---|---|---|", "| **blocks** | | |"]
    flags = [line.split("`")[1] for line in lines if line.startswith("| `--")]
    assert flags == [f"--{name}" for name in Options.names()]
    assert (
        "| `--max_new_tokens` | 512 | generate at most this many tokens (also `--max_gen_toks`, `--gen_length`) |"
        in lines
    )
    (strategy,) = [line for line in lines if "--remasking_strategy" in line]
    assert "`sequential`" in strategy
    assert all(line.count("|") - line.count("\\|") == 4 for line in lines)


MARKED = "before\n<!-- flags: tests.shared.marked:Options -->\n{}<!-- /flags -->\nafter\n"


def test_only_what_is_marked_is_made_anew(monkeypatch):
    monkeypatch.setitem(sys.modules, "tests.shared.marked", sys.modules[__name__])
    fresh = refreshed(MARKED.format("| stale |\n"))
    assert fresh == MARKED.format(flags_table(Options))
    assert refreshed(fresh) == fresh
    assert refreshed("no table\n") == "no table\n"


def test_files_are_rewritten_or_only_checked(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "tests.shared.marked", sys.modules[__name__])
    page = tmp_path / "README.md"
    page.write_text(MARKED.format(""))
    with pytest.raises(SystemExit) as stale:
        docs.main([str(page), "--check"])
    assert (stale.value.code, capsys.readouterr().out) == (1, f"stale: {page}\n")
    assert page.read_text() == MARKED.format("")
    docs.main([str(page)])
    assert page.read_text() == MARKED.format(flags_table(Options))
    assert capsys.readouterr().out == f"written: {page}\n"
    docs.main([str(page), "--check"])
    assert capsys.readouterr().out == ""


def test_no_table_of_the_repository_is_stale(capsys):
    docs.main(["--check"])
    assert capsys.readouterr().out == ""


def test_every_page_is_looked_at():
    names = {str(p.relative_to(ROOT)) for p in docs.readmes()}
    assert {"README.md", "eval/README.md", "benchmarks/frontier/README.md"} <= names
    assert {"CONTRIBUTING.md", "SDAR/OPTIONS.md", "docs/a-decode.md", "benchmarks/frontier/SETTINGS.md"} <= names
    assert not any(name.startswith(".") for name in names)


def row(setting: str, task: str) -> dict:
    return {"family": "F", "pretrained": "tiny", "setting": setting, "task": task, "accuracy": 0.5, "low": 0.4, "high": 0.6, "tokens": 10, "problems": 4,
            "forwards_per_token": 0.25, "by_kind": dict.fromkeys(("prefill", "draft", "verify", "commit"), 0.0625), "accepted_per_verify": None, "verifies": 0,
            "tokens_per_second": None, "same": None, "lossless": True, "options": {}}  # fmt: skip


def test_tables_of_recorded_results(tmp_path):
    rows = [row("one", "t"), row("plain a", "t"), row("plain a", "u")]
    (tmp_path / "results.json").write_text(json.dumps({"grid": {"baseline": "one"}, "rows": rows}))
    made = lambda head: refreshed(f"a\n<!-- compare {head} -->\nold\n<!-- /compare -->\nb", tmp_path).splitlines()  # noqa: E731
    assert made("rows: results.json t ^plain")[2:-2] == [
        "| setting | accuracy % (95 %) | forwards / token | prefill, draft, verify, commit | accepted / verify | p | texts as baseline |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| plain a | 50.0 (40.0 to 60.0) | 0.250 | 0.062, 0.062, 0.062, 0.062 |  |  |  |",
    ]
    assert len(made("rows: results.json")) == 2 + 2 + 3 + 2
    assert len(made("rows: results.json all plain a")) == 2 + 2 + 2 + 2, "a pattern may have a space"
    two = "<!-- compare families: results.json -->\n<!-- /compare -->\nkept\n<!-- compare rows: results.json all -->\n<!-- /compare -->\n"
    assert "kept" in refreshed(two, tmp_path).splitlines()
    with pytest.raises(UserError, match="unknown table 'row'"):
        made("row: results.json")
    with pytest.raises(UserError, match="not there"):
        made("rows: nothing.json")


def test_tables_of_a_benchmark(tmp_path):
    result = {"machine": {"name": "M", "read_bytes_per_second": 2e12, "operations_per_second": 3e12}, "torch": "2", "dtype": "float32", "context": 8,
              "block_length": 4, "capture_seconds": 0.0, "decodes": [],
              "forwards": [{"forward": "draft", "ms": 2.0, "floor_ms": 1.0, "over_floor": 2.0}]}  # fmt: skip
    (tmp_path / "speed.json").write_text(json.dumps(result))
    made = refreshed("<!-- benchmark: speed.json -->\n<!-- /benchmark -->\n", tmp_path)
    assert "| draft | 2.00 | 1.00 | 2.00 x |" in made
    assert refreshed(made, tmp_path) == made
    result["machine"]["name"] = "NVIDIA H200"  # 4.8 TB/s by its datasheet
    result["forwards"][0]["read_bytes"] = 8352 * 10**6  # in 2 ms: 4.176 TB/s
    (tmp_path / "speed.json").write_text(json.dumps(result))
    made = refreshed(made, tmp_path)
    assert "| forward | ms | floor ms | over the floor | % of the datasheet bandwidth |" in made
    assert "| draft | 2.00 | 1.00 | 2.00 x | 87 |" in made
    result["machine"]["name"] = "M"
    (tmp_path / "speed.json").write_text(json.dumps(result))
    assert "datasheet" not in refreshed(made, tmp_path), "a device that is not known"
