"""READMEs tell the truth: their commands run (or at least parse), their tables are fresh, their files exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from eval import compare, docs
from eval.model import DraftAndVerifyLM
from fast_dllm_v2 import example_v2
from llada2 import example_llada
from sdar import generate, generate_ssd_policy
from shared.scripts.cli import choose_script, parse

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", *sorted(ROOT.glob("[!.]*/README.md")), *sorted(ROOT.glob("benchmarks/*/README.md"))]
SCRIPTS = {
    "generate.py": lambda argv: (generate.SCRIPT, argv),
    "generate_ssd_policy.py": lambda argv: (generate_ssd_policy.SCRIPT, argv),
    "example_v2.py": lambda argv: choose_script(example_v2.SCRIPTS, argv, "generate_fn", "fast"),
    "example_llada.py": lambda argv: choose_script(example_llada.SCRIPTS, argv, "generate_fn", "cached"),
}
# Commands that a test cannot run: they fetch a real checkpoint, need a GPU, take long, or are the suite itself. Their flags are still parsed
# where a parser of ours reads them.
NOT_RUN = (
    "JetLM/",
    "Efficient-Large-Model/",
    "inclusionAI/",
    "make ",
    "pip ",
    "git ",
    "python -m train",
    "torchrun",
    "python -m pytest",
    "python -m eval",
)


def commands() -> list[tuple[Path, str]]:
    """Every line of every ``bash`` block, with the folder it runs in (a ``cd`` line moves the rest of its block)."""
    found = []
    for readme in READMES:
        for block in re.findall(r"```bash\n(.*?)```", readme.read_text(), re.DOTALL):
            folder = readme.parent
            for line in block.replace("\\\n", " ").splitlines():
                line = line.split(" #")[0].strip()
                if not line or line.startswith("#"):
                    continue
                if line.startswith("cd "):
                    folder = (ROOT if readme.parent == ROOT else readme.parent) / line[3:]
                    continue
                found.append((folder, line))
    return found


COMMANDS = commands()


def test_there_are_commands():
    assert any("generate_ssd_policy.py" in c for _, c in COMMANDS)
    assert [c for _, c in COMMANDS if c.startswith("make ")][:2] == ["make demo", "make test"]


@pytest.mark.parametrize(("folder", "command"), COMMANDS, ids=[c for _, c in COMMANDS])
def test_command(folder, command, tmp_path):
    words = [w for w in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", w)]
    assert folder.is_dir(), folder
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if words[0] == "python" and words[1] in SCRIPTS:
        script, rest = SCRIPTS[words[1]](words[2:])
        parse(script.options, script.presets, rest, script.description, script.shipped)
    if words[:3] == ["python", "-m", "eval.compare"]:
        args = compare.parser().parse_args(words[3:])
        assert compare.grid_from(args).settings
    if any(mark in command for mark in NOT_RUN):
        return
    assert words[0] == "python", f"a command no test knows how to run: {command}"
    words = [w.replace("results/", f"{tmp_path}/") for w in words[1:]]
    run = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout


class Loaded(Exception):
    """The checks before the checkpoint are passed."""


EVALUATIONS = {c for r in READMES for c in re.findall(r"python -m eval (--model dllm [^`\n]*)", r.read_text())}


@pytest.mark.parametrize("command", sorted(EVALUATIONS))
def test_evaluation_command(command, monkeypatch):
    """lm-eval's parser takes the line, and the door every key of its ``model_args``; the checkpoint is not loaded."""
    from lm_eval._cli import HarnessCLI

    def loaded(*args, **kwargs):
        raise Loaded

    monkeypatch.setattr(sys, "argv", ["eval", "run", *shlex.split(command)])
    monkeypatch.setattr("shared.network.loading.CheckpointModel.from_pretrained", loaded)
    args = HarnessCLI().parse_args()
    with pytest.raises(Loaded):
        DraftAndVerifyLM(**args.model_args, batch_size=args.batch_size)


def test_there_are_evaluations():
    assert len(EVALUATIONS) > 10


@pytest.mark.parametrize("readme", READMES, ids=lambda r: str(r.relative_to(ROOT)))
def test_tables_are_fresh(readme):
    assert docs.refreshed(readme.read_text()) == readme.read_text(), "run: python -m eval.docs"


@pytest.mark.parametrize("readme", READMES, ids=lambda r: str(r.relative_to(ROOT)))
def test_links_lead_somewhere(readme):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", readme.read_text()):
        assert (readme.parent / target).exists(), target


def test_the_file_tree_is_true():
    """Every path in the annotated tree of the main README exists."""
    tree = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    folder = None
    for line in tree.splitlines():
        if not line.strip():
            continue
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name.rstrip("/") if name.endswith("/") else None
        path = ROOT / name if folder is None or not line.startswith(" ") else ROOT / folder / name
        assert path.exists(), path
