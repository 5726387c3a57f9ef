"""READMEs and the pages beside them tell the truth: commands run (or at least parse), tables are fresh, files exist. And they are short."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from d2f import example_d2f
from eval import benchmark, compare, docs
from eval.model import DraftAndVerifyLM
from fast_dllm_v2 import example_v2
from llada2 import example_llada
from mdlm_dvd.scripts import plot_metrics, run_evals
from mdlm_dvd.src.evals.suite.__main__ import parser as suite_parser
from sdar import generate, generate_ssd_policy
from shared.scripts.cli import choose_script, parse
from tests import programs
from train import __main__ as train

ROOT = Path(__file__).parent.parent
PAGES = docs.readmes()
READMES = [p for p in PAGES if p.name == "README.md" and "tiny" not in p.parts]  # those of tiny/ are model cards
LINES, WIDTH = 170, 160
SCRIPTS = {
    "generate.py": lambda argv: (generate.SCRIPT, argv),
    "generate_ssd_policy.py": lambda argv: (generate_ssd_policy.SCRIPT, argv),
    "example_v2.py": lambda argv: choose_script(example_v2.SCRIPTS, argv, "generate_fn", "fast"),
    "example_d2f.py": lambda argv: choose_script(example_d2f.SCRIPTS, argv, "generate_fn", "d2f"),
    "example_llada.py": lambda argv: choose_script(example_llada.SCRIPTS, argv, "generate_fn", "cached"),
}
PARSERS = {
    "eval.compare": compare.parser().parse_args,
    "eval.benchmark": benchmark.parse,
    "train": train.parse,
    "mdlm_dvd.src.evals.suite": suite_parser().parse_args,
    "run_evals.py": run_evals.parser().parse_args,
    "plot_metrics.py": plot_metrics.parser().parse_args,
}
# Commands that a test cannot run: they fetch a real checkpoint, need a GPU, take long, or are the suite itself. Their flags are still parsed
# where a parser of ours reads them.
NOT_RUN = (
    "JetLM/",
    "Efficient-Large-Model/",
    "inclusionAI/",
    "GSAI-ML/",
    "Dream-org/",
    "make ",
    "pip ",
    "git ",
    "python -m train",
    "torchrun",
    "python -m pytest",
    "python -m eval",
    "python -m mdlm_dvd.src.evals.suite",
    "scripts/",
    "bash ",
    "jupyter ",
    "llada_8b",
)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def home(page: Path) -> Path:
    """The folder in which the commands of a page begin: its family's, or the repository's."""
    return page.parent if (page.parent / "family.py").is_file() else ROOT


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands() -> list[tuple[Path, str]]:
    """Every line of every ``bash`` block, with the folder it runs in (a ``cd`` line moves the rest of its block)."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            folder = home(page)
            for line in block.replace("\\\n", " ").splitlines():
                line = line.split(" #")[0].strip()
                if not line or line.startswith("#"):
                    continue
                if line.startswith("cd "):
                    folder = home(page) / line[3:]
                    continue
                found.append((folder, line))
    return list(dict.fromkeys(found))


COMMANDS = commands()


def test_there_are_commands():
    assert any("generate_ssd_policy.py" in c for _, c in COMMANDS)
    assert "make demo" in [c for _, c in COMMANDS]
    assert "`make test`" in (ROOT / "CONTRIBUTING.md").read_text()


def check_parses(words: list[str], folder: Path) -> None:
    """The parser of the script or module takes the command line."""
    if words[0] == "torchrun":
        words = ["python", *[w for k, w in enumerate(words) if k and not w.startswith("--nproc_per_node")]]
    script = Path(words[1]).name
    if script in SCRIPTS:
        chosen, rest = SCRIPTS[script](words[2:])
        how = {"ships": chosen.ships, "arguments": chosen.arguments}
        parse(chosen.options, chosen.presets, rest, chosen.description, chosen.shipped, **how)
    elif words[1] == "-m":
        assert importlib.util.find_spec(words[2]), f"no such module: {words[2]}"
        args = PARSERS.get(words[2], lambda rest: None)(words[3:])
        if words[2] == "eval.compare":
            assert compare.grid_from(args).settings
    else:
        assert (folder / words[1]).is_file() or (ROOT / words[1]).is_file(), words[1]
        PARSERS.get(script, lambda rest: None)(words[2:])


@pytest.mark.parametrize(("folder", "command"), COMMANDS, ids=[c for _, c in COMMANDS])
def test_command(folder, command, tmp_path):
    words = [w for w in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", w)]
    assert folder.is_dir(), folder
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if words[0] in ("python", "torchrun"):
        check_parses(words, folder)
    if words[0] in ("bash", "jupyter"):
        assert (folder / words[-1]).is_file()
    if any(mark in command for mark in NOT_RUN):
        return
    assert words[0] == "python", f"a command no test knows how to run: {command}"
    words = [w.replace("results/", f"{tmp_path}/") for w in words[1:]]
    assert run(words, folder).stdout


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    done = programs.run(words, folder)
    assert done.returncode == 0, done.stderr
    return done


EXAMPLES = [(page, code) for page in PAGES for code in blocks(page, "python")]


@pytest.mark.parametrize(("page", "code"), EXAMPLES, ids=[f"{named(p)}-{k}" for k, (p, _) in enumerate(EXAMPLES)])
def test_python_example(page, code, tmp_path):
    """It runs, from any folder."""
    (tmp_path / "example.py").write_text(code)
    out = run(["example.py"], tmp_path).stdout
    assert out or "print" not in code


def test_there_are_python_examples():
    assert {named(p) for p, _ in EXAMPLES} >= {f"{f}/README.md" for f in ("SDAR", "Fast-dLLM-v2", "LLaDA2", "D2F")}


class Loaded(Exception):
    """The checks before the checkpoint are passed."""


EVALUATIONS = {c for p in PAGES for c in re.findall(r"python -m eval (--model dllm [^`\n]*)", p.read_text())}


@pytest.mark.parametrize("command", sorted(EVALUATIONS))
def test_evaluation_command(command, monkeypatch):
    """lm-eval's parser takes the line, and the door every key of its ``model_args``; the checkpoint is not loaded."""
    from lm_eval._cli import HarnessCLI

    def loaded(*args, **kwargs):
        raise Loaded

    monkeypatch.setattr(sys, "argv", ["eval", "run", *shlex.split(command)])
    monkeypatch.setattr("eval.model.load_models", loaded)
    args = HarnessCLI().parse_args()
    with pytest.raises(Loaded):
        DraftAndVerifyLM(**args.model_args, batch_size=args.batch_size)


def test_there_are_evaluations():
    assert len(EVALUATIONS) > 10


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_tables_are_fresh(page):
    assert docs.refreshed(page.read_text()) == page.read_text(), "run: python -m eval.docs"


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    heads = re.findall(r"(?m)^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


FOLDERS = "|".join(p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith("."))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_named_files_exist(page):
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", page.read_text()):
        assert path.startswith("results/") or (ROOT / path).exists(), path


def test_named_parts_of_a_decode_are_there():
    """Every function and class that docs/a-decode.md names behind a file is defined in it."""
    found = re.findall(r"`([\w./-]+\.py)` \(([^)]*)\)", (ROOT / "docs/a-decode.md").read_text())
    assert len(found) > 20
    for path, parts in found:
        code = (ROOT / path).read_text()
        for part in re.findall(r"`(\w+)`", parts):
            assert re.search(rf"(?m)^(def|class) {part}\b", code), f"{path}: {part}"


def test_the_tree_is_true_and_whole():
    """The tree of the main README has one level, and names every folder and file there is."""
    (tree,) = [b for b in blocks(ROOT / "README.md", "text") if b.startswith("README.md")]
    listed = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    assert all((ROOT / name).exists() for name in listed)
    made = {"results", "build", "outputs"} | {p.name for p in ROOT.glob("*.egg-info")}
    there = {p.name for p in ROOT.iterdir() if p.name[0] not in "._"} - made
    assert listed == there


@pytest.mark.parametrize("page", [p for p in PAGES if "\n## Files\n" in p.read_text()], ids=named)
def test_listed_files_are_there(page):
    listed = re.search(r"\n## Files\n\n```text\n(.*?)```", page.read_text(), re.DOTALL)[1].splitlines()
    assert len(listed) > 5
    assert [line for line in listed if not (page.parent / line.split()[0]).exists()] == []


def prose(page: Path) -> list[str]:
    """The lines of a page outside code, tables and comments."""
    fence, found = "", []
    for line in page.read_text().splitlines():
        mark = re.match(r"`{3,}", line)
        if mark and (not fence or mark[0] == fence):
            fence = "" if fence else mark[0]
        elif not fence and not line.startswith(("|", "<!--")):
            found.append(line)
    return found


@pytest.mark.parametrize("page", READMES, ids=named)
def test_readmes_are_short(page):
    assert len(page.read_text().splitlines()) <= LINES


@pytest.mark.parametrize("page", [p for p in PAGES if "tiny" not in p.parts], ids=named)
def test_lines_of_prose_are_short(page):
    assert [line for line in prose(page) if len(line) > WIDTH] == []
