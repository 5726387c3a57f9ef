from __future__ import annotations

import runpy
import sys
from dataclasses import dataclass, field

from shared.options import Blocks, FlatOptions, Unmask
from shared.scripts.docs import flags_table, refreshed


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


def test_files_are_rewritten(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tests.shared.marked", sys.modules[__name__])
    monkeypatch.setattr(sys, "argv", ["docs", str(tmp_path / "README.md")])
    (tmp_path / "README.md").write_text(MARKED.format(""))
    monkeypatch.delitem(sys.modules, "shared.scripts.docs")
    runpy.run_module("shared.scripts.docs", run_name="__main__")
    assert (tmp_path / "README.md").read_text() == MARKED.format(flags_table(Options))
