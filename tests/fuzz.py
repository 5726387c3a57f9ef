"""Bad input by the hundred: whatever is asked ends well or in one line, loses nothing, and begins nothing that could have been refused.

python -m tests.fuzz --count 500 --processes 30 --seed 0

``--count`` inputs are tried in this process: flags, model_args, gen_kwargs, grids, configs, tokenizer files, prompt files, task files, and files of earlier
runs. ``--processes`` command lines are run as a user runs them. Every input is drawn from (seed, its number), so ``--only 17`` tries number 17 again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import yaml

from eval import benchmark, compare
from eval.cells import Tasks
from eval.grid import Asked, grid_of, read_grid, run_of_flag
from eval.model import DraftAndVerifyLM
from fast_dllm_v2 import example_v2
from llada2 import example_llada
from sdar import SDARForCausalLM, generate, generate_ssd_policy
from shared.errors import UserError
from shared.gpu.engine import Engine
from shared.scripts.cli import build_parser, parse
from shared.scripts.identity import fingerprint
from shared.scripts.prompts import encode_prompt, read_prompt_file
from shared.scripts.store import Store
from tests.family_checks import golden_folder
from train.__main__ import parse as parse_train

ROOT = Path(__file__).parents[1]
SCRIPTS = [generate.SCRIPT, generate_ssd_policy.SCRIPT, *example_v2.SCRIPTS.values(), *example_llada.SCRIPTS.values()]
WORDS = ["", " ", "0", "-1", "1", "2", "7", "nan", "-inf", "1e400", str(10**30), "0.5", "1,5", "true", "no", "None", "none", "{", "[1, 2", "[]", "{}", "null",
         "=", ",", "a=b", "a=b,=", "--", "-", "../..", "/", "/dev/null", "/proc/none/x", "~", "中文 ±", "a" * 5000, "\t\n", "%s", "{x}", "{0}", "*", "tiny", "auto", "cpu",
         "cuda:99", "float16", "int3", "SDAR/tiny", "SDAR/none", "always", "<|MASK|>", "\udcff", "a\0b"]  # fmt: skip
VALUES = [None, True, False, 0, -1, 1, 3, 10**30, -(10**30), 0.5, 1e308, float("nan"), float("inf"), "", "x", "中文", "\ud800", [], [1], [None], ["a", {}], {}, {"a": 1}]  # fmt: skip
ENDS = (UserError, FloatingPointError)  # what a program tells in one line; and OSError, with the name of a file
GRID = {"name": "g", "tasks": ["instructions"], "problems": 2, "baseline": "one", "runs": [
    {"decoder": "standard", "name": "one", "options": {"block_length": 1}},
    {"decoder": "ssd_policy", "preset": "tiny", "name": "two {block_length}", "options": {"block_length": [8, 16]}, "variants": {"a": {}}}]}  # fmt: skip
TASK = {"task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": "rows.jsonl"}, "test_split": "train", "output_type": "generate_until",
        "doc_to_text": "{{q}}", "doc_to_target": "{{q}}", "generation_kwargs": {"max_gen_toks": 4, "until": []}, "metric_list": [{"metric": "exact_match"}]}  # fmt: skip


class Place:
    """A folder with whole inputs, from which bad ones are made."""

    def __init__(self, root: Path):
        self.root, self.number = root, 0
        self.prompts = root / "prompts.jsonl"
        self.prompts.write_text(
            "".join(json.dumps({"prompt": f"What is {k} + 2?", "answer": k + 2}) + "\n" for k in range(2))
        )
        self.results = root / "results"  # of a script
        generate.SCRIPT.run(["--prompt_file", str(self.prompts), "--output_dir", str(self.results), *SHORT])

    def new(self, name: str) -> Path:
        self.number += 1
        return self.root / f"{self.number}-{name}"

    def copied(self, folder: Path) -> Path:
        return Path(shutil.copytree(folder, self.new(folder.name)))

    @cached_property
    def lm(self) -> DraftAndVerifyLM:
        return DraftAndVerifyLM(pretrained="SDAR/tiny", batch_size=2)


SHORT = ["--max_new_tokens", "3", "--device", "cpu", "--compare", "false"]


def flags_of(rng: random.Random, parser: argparse.ArgumentParser, most: int = 3) -> list[str]:
    """A few flags of ``parser``, misspelled now and then, with any words behind them."""
    found = []
    for action in rng.sample(parser._actions, rng.randrange(1, most + 1)):
        flag = rng.choice(action.option_strings or ["--x"])
        if rng.random() < 0.1:
            flag = flag.replace(rng.choice(flag[1:]), "", 1)
        found += [flag, *rng.choices(WORDS, k=rng.choice([0, 1, 1, 1, 1, 2]))]
    return found


def changed(rng: random.Random, data, values: list = VALUES):
    """``data`` with one value, at any depth, replaced, dropped or added."""
    data = json.loads(json.dumps(data))
    at, above = data, None
    while isinstance(at, (dict, list)) and at and (above is None or rng.random() < 0.7):
        above, key = at, rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        at = above[key]
    how = rng.random()
    if how < 0.7:
        above[key] = rng.choice(values)
    elif how < 0.85:
        del above[key]
    elif isinstance(above, dict):
        above[rng.choice(["x", "name", "dtype", "rope_scaling", "task", "include", ""])] = rng.choice(values)
    else:
        above.append(rng.choice(values))
    return data


def garbled(rng: random.Random, data: bytes) -> bytes:
    """``data`` with a piece cut out, doubled, or written over."""
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    b = min(b, a + rng.choice([1, 5, 100]))
    piece = rng.choice(
        [b"", data[a:b] * 2, bytes(rng.randrange(256) for _ in range(4)), b"\0", b"}", b"\xef\xbb\xbf", b"\n"]
    )
    return data[:a] + (b"" if rng.random() < 0.2 else piece + data[b:])


def unchanged(folder: Path) -> Callable[[], list[str]]:
    """Says, when it is called, which files in ``folder`` are no longer what they are now."""
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return lambda: [p.name for p, data in before.items() if not p.is_file() or p.read_bytes() != data]


# Each draws an input and returns what to do with it, and what must hold if that is refused.


def script_flags(rng: random.Random, place: Place):
    script = rng.choice(SCRIPTS)
    words = flags_of(rng, build_parser(script.options, "", ()))
    return lambda: parse(script.options, script.presets, words, "", script.shipped), words


def script_runs(rng: random.Random, place: Place):
    script, folder = rng.choice(SCRIPTS), place.copied(place.results)
    words = [
        "--prompt_file",
        str(place.prompts),
        *SHORT,
        "--output_dir",
        str(folder),
        *flags_of(rng, build_parser(script.options, "", ())),
    ]
    for flag in ("--output_dir", "--trace"):  # never into this folder or the root
        for k in range(len(words) - 1):
            if words[k] == flag and not words[k + 1].startswith(("/", str(place.root))):
                words[k + 1] = str(place.new("o") / words[k + 1][:50].replace("\0", ""))
            elif words[k] == flag and words[k + 1] in ("/", "/dev/null"):
                words[k + 1] = "/proc/none"
    return lambda: script.run(words), words, unchanged(folder)


def model_arguments(rng: random.Random, place: Place):
    keys = ["pretrained", "family", "decoder", "preset", "dtype", "device", "batch_size", "max_batch_size", "seed", "custom_generate", "custom_model_class",
            "revision", "enable_thinking", "gen_kwargs", "block_length", "max_new_tokens", "temperature", "model", "drafter", "x"]  # fmt: skip
    given = {"pretrained": "SDAR/tiny"} | {k: rng.choice(WORDS + VALUES) for k in rng.sample(keys, rng.randrange(1, 4))}
    if not isinstance(given.get("gen_kwargs"), dict | None):
        given["gen_kwargs"] = {rng.choice(keys): given["gen_kwargs"]}
    return lambda: DraftAndVerifyLM(**given), given


def generation_keys(rng: random.Random, place: Place):
    names = [
        *place.lm._decoder.options_class.names(),
        "until",
        "max_gen_toks",
        "do_sample",
        "num_beams",
        "max_length",
        "stop",
        "x",
    ]
    layers = [{rng.choice(names): rng.choice(WORDS + VALUES) for _ in range(rng.randrange(3))} for _ in range(3)]

    def use() -> None:
        place.lm.use(
            rng.choice(["ssd_policy", "standard", "x"]), rng.choice([None, "tiny", "paper"]), layers[0], **layers[1]
        )
        place.lm.options_for(layers[2])
        place.lm.limit_for(layers[2])

    return use, layers


def grids(rng: random.Random, place: Place):
    data = changed(rng, GRID)
    if rng.random() < 0.5:
        return lambda: grid_of(data), data
    path = place.new("grid.yaml")
    text = garbled(rng, yaml.safe_dump(GRID).encode())
    path.write_bytes(text)
    return lambda: read_grid(path), text


def run_flags(rng: random.Random, place: Place):
    keys = ["family", "decoder", "preset", "name", "pretrained", "block_length", "temperature", "x", ""]
    text = ",".join(f"{rng.choice(keys)}{rng.choice(['=', '=', '=', ''])}{rng.choice(WORDS)}" for _ in range(3))
    return lambda: grid_of({"name": "g", "tasks": ["instructions"], "runs": [run_of_flag(text)]}), text


def program_flags(rng: random.Random, place: Place):
    parser, read = rng.choice([
        (compare.parser(), lambda words: compare.grid_from(compare.parser().parse_args(words))),
        (benchmark.parser(), lambda words: benchmark.check(benchmark.parse(words))),
    ])  # fmt: skip
    words = [w for w in flags_of(rng, parser) if w not in ("--json", "--profile")]
    return lambda: read(words), words


def train_flags(rng: random.Random, place: Place):
    names = [
        "--seconds",
        "--steps",
        "--size",
        "--batch_tokens",
        "--workers",
        "--seed",
        "--device",
        "--role",
        "--count",
        "--checkpoint",
        "--model",
        "--x",
    ]
    words = [rng.choice(["SDAR", "LLaDA2", "probe", "tokenizer", "x"])]
    words += [w for _ in range(2) for w in (rng.choice(names), rng.choice(WORDS))]
    return lambda: parse_train(words), words


def configs(rng: random.Random, place: Place):
    folder = place.copied(golden_folder("SDAR") / "model")
    path = folder / "config.json"
    if rng.random() < 0.8:
        path.write_text(json.dumps(changed(rng, json.loads(path.read_text()))))
    else:
        path.write_bytes(garbled(rng, path.read_bytes()))

    def load() -> None:
        model = SDARForCausalLM.from_pretrained(folder)
        generate.block_diffusion_generate(model, [[1, 2, 3]], max_new_tokens=4)

    return load, path.read_bytes()


def tokenizer_files(rng: random.Random, place: Place):
    folder = place.copied(ROOT / "SDAR" / "tiny")
    path = rng.choice([p for p in sorted(folder.glob("*.json")) if p.name not in ("config.json",)])
    if path.stat().st_size < 100_000 and rng.random() < 0.7:
        path.write_text(json.dumps(changed(rng, json.loads(path.read_text()))))
    else:
        path.write_bytes(garbled(rng, path.read_bytes()))
    fingerprint.cache_clear()
    words = ["--model", str(folder), "--prompt", "What is 2 + 2?", *SHORT]
    return lambda: generate.SCRIPT.run(words), path.name


def prompt_files(rng: random.Random, place: Place):
    path = place.new(rng.choice(["p.jsonl", "p.jsonl", "p.txt", "p"]))
    if rng.random() < 0.5:
        record = changed(
            rng,
            {"prompt": "a b", "messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
        )
        path.write_text(json.dumps(record) + "\n")
    else:
        path.write_bytes(garbled(rng, place.prompts.read_bytes()))

    def read() -> None:
        for record in read_prompt_file(path):
            encode_prompt(place.lm.tokenizer, record)

    return read, path.read_bytes()


def task_files(rng: random.Random, place: Place):
    folder = place.new("tasks")
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"q": "one"}\n{"q": "two"}\n')
    task = json.loads(json.dumps(TASK).replace("rows.jsonl", str(folder / "rows.jsonl")))
    text = yaml.safe_dump(changed(rng, task)).encode()
    (folder / "mine.yaml").write_bytes(text if rng.random() < 0.7 else garbled(rng, text))

    def load() -> None:
        tasks = Tasks(grid_of(GRID))
        tasks.manager = type(tasks.manager)(include_path=str(folder), include_defaults=False)
        tasks.check(
            Asked("mine", rng.choice([None, None, "exact_match", "exact_match,none", "acc", "exact_match,x"])), False
        )
        tasks.generation(Asked("mine"))

    return load, text


def files_of_earlier_runs(rng: random.Random, place: Place):
    folder = place.copied(place.results)
    path = rng.choice([folder / "run.json", folder / "outputs.jsonl"])
    path.write_bytes(garbled(rng, path.read_bytes()))
    words = ["--prompt_file", str(place.prompts), "--output_dir", str(folder), *SHORT]
    return lambda: generate.SCRIPT.run(words), path.name, unchanged(folder)


def files_of_comparisons(rng: random.Random, place: Place):
    folder = place.new("compared")
    folder.mkdir()
    name, text = rng.choice([
        ("machine.json", b'{"name": "CPU", "read": 1e10, "rate": 1e11, "datasheet": null}'),
        ("cells.jsonl", b'{"key": "a", "docs": [0], "values": [1.0]}\n{"key": "b", "docs": [0], "values": [1.0]}\n'),
    ])  # fmt: skip
    (folder / name).write_bytes(garbled(rng, text))

    def read() -> None:
        compare.machine_in(folder)
        compare.cells_in(folder)
        Store(folder, "cells", "key").close()

    return read, (folder / name).read_bytes(), unchanged(folder)


KINDS = [script_flags, script_runs, model_arguments, generation_keys, grids, run_flags, program_flags, train_flags, configs, tokenizer_files, prompt_files,
         task_files, files_of_earlier_runs, files_of_comparisons]  # fmt: skip


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def engines() -> Iterator[list]:
    """The engines that were made whole: a decode has begun."""
    made, init = [], Engine.__init__

    def counted(self, *arguments, **keywords):
        init(self, *arguments, **keywords)
        made.append(self)

    Engine.__init__ = counted
    try:
        yield made
    finally:
        Engine.__init__ = init


def wrong_refusal(error: Exception, begun: list, intact: list[Callable]) -> str | None:
    """What is wrong with how an input was refused."""
    if "\n" in str(error).strip() and not isinstance(error, OSError):
        return f"more than a line: {error}"
    if begun and not isinstance(error, FloatingPointError):
        return f"begun, then refused: {error}"
    lost = [name for check in intact for name in check()]
    return f"{lost} changed though the run was refused" if lost else None


def tried(number: int, seed: int, place: Place) -> tuple[str, str | None]:
    """``(kind and end of the input, what is wrong with that)``."""
    rng = random.Random(f"{seed} {number}")
    kind = KINDS[number % len(KINDS)]
    do, what, *intact = kind(rng, place)
    end, wrong = "done", None
    out, err = io.StringIO(), io.StringIO()
    try:
        with engines() as begun, at_most(120), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                do()
            except SystemExit as stop:  # --help
                wrong = f"exit code {stop.code}" if stop.code else None
            except (*ENDS, OSError) as error:
                if isinstance(error, OSError) and not error.filename:
                    raise
                end, wrong = "refused", wrong_refusal(error, begun, intact)
    except BaseException:
        wrong = traceback.format_exc(limit=-6)
    if wrong:
        wrong = f"{number} {kind.__name__}: {what!r:.600}\n{wrong}"
    return f"{kind.__name__} {end}", wrong


BAD = {
    "script": [["--block_length", "0"], ["--blok_length", "4"], ["--model", "/none"], ["--model", ""], ["--prompt_file", "/none"], ["--prompt", " "],
               ["--prompt_file", "bad.jsonl"], ["--trace", "/proc/none/x"], ["--trace", "."], ["--output_dir", "/dev/null/x"], ["--output_dir", "bad.jsonl"],
               ["--preset", "papper"], ["--dtype", "int3"], ["--device", "abacus"], ["--temperature", "nan"], ["--max_new_tokens", "1e400"],
               ["--mask_id", "99999999"], ["--stopping_criteria_idx", "x"], ["--tensor_parallel", "3"], ["--seed", "-1"], ["--prompt_length", "0"],
               ["--prompt", "中文", "--max_new_tokens", str(10**9)], ["--model", "big"], ["word"]],
    "-m eval": [["--tasks", "wrod_problems"], ["--model_args", "pretrained=/none"], ["--model_args", "family=SADR,pretrained=SDAR/tiny"], ["--tasks", "functions"],
                ["--model_args", "pretrained=SDAR/tiny,blok_length=8"], ["--gen_kwargs", "temperature=hot"], ["--output_path", "/dev/null/x"], ["--seed", "x"],
                ["--model_args", "pretrained=SDAR/tiny,revision=v2"], ["--batch_size", "0"], ["--resume"], ["--use_cache", "x"], ["--config", "bad.jsonl"]],
    "-m eval.compare": [["none.yaml"], ["bad.jsonl"], ["--run", "family=SADR"], ["--run", "family=SDAR,blok=1", "--tasks", "instructions"], ["--problems", "0"],
                        ["--run", "family=SDAR", "--tasks", "functions"], ["--run", "family=SDAR,pretrained=/none", "--tasks", "instructions"]],
    "-m eval.benchmark": [["--json", "/dev/null/x"], ["--profile", "."], ["--shape", "none"], ["--batch", "0"], ["--context", "x"], ["--vs", "nomodule:f"],
                          ["--model", "big"], ["--vs-kwargs", "{"]],
    "-m train": [["SADR"], ["SDAR", "--out", "/dev/null/x", "--steps", "1"], ["probe", "--model", "/none"], ["probe", "--model", "SDAR/tiny", "--count", "0"],
                 ["SDAR", "--out", "o"], ["SDAR", "--out", "o", "--steps", "-1"], ["tokenizer", "--out", "bad.jsonl"]],
    "-m eval.precision": [["--model", "/none"], ["--family", "SADR"], ["--context", "x"]],
    "-m eval.agreement": [["--model", "/none"], ["--family", "SADR"]],
}  # fmt: skip
SCRIPT_FILES = [
    "SDAR/generate.py",
    "SDAR/generate_ssd_policy.py",
    "Fast-dLLM-v2/example_v2.py",
    "LLaDA2/example_llada.py",
]
TERMINALS = [{}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}]


def run_as_a_process(number: int, seed: int, folder: Path) -> tuple[str, str | None]:
    """The same for a command line, which must end with one line and exit code 2."""
    rng = random.Random(f"process {seed} {number}")
    program = rng.choice([*SCRIPT_FILES, *(p for p in BAD if p != "script")])
    words = rng.choice(BAD["script" if program in SCRIPT_FILES else program])
    call = [str(ROOT / program)] if program in SCRIPT_FILES else program.split()
    if program == "-m eval":
        standard = {
            "--model": "dllm",
            "--model_args": "pretrained=SDAR/tiny",
            "--tasks": "instructions",
            "--limit": "1",
        }
        words = [w for k, v in standard.items() if k not in words for w in (k, v)] + words
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **rng.choice(TERMINALS)}
    done = subprocess.run(
        [sys.executable, *call, *words], cwd=folder, capture_output=True, env=environment, timeout=600
    )
    err = done.stderr.decode(errors="replace")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    wrong = None
    if done.returncode != 2 or len(lines) != 1 or "Traceback" in err:
        wrong = f"process {number}: {program} {words!r:.300}\nexit code {done.returncode}\n{err[-1500:]}"
    return f"{program} refused", wrong


def files_for_processes(folder: Path) -> None:
    (folder / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt":\n')
    big = Path(shutil.copytree(golden_folder("SDAR") / "model", folder / "big"))
    config = json.loads((big / "config.json").read_text()) | {"num_hidden_layers": 10**30}
    (big / "config.json").write_text(json.dumps(config))


def fuzz(count: int, processes: int, seed: int, only: int | None = None) -> tuple[Counter, list[str]]:
    """How the inputs ended, and what is wrong."""
    ends, found = Counter(), []
    with tempfile.TemporaryDirectory() as root:
        with contextlib.redirect_stdout(io.StringIO()):
            place = Place(Path(root))
        for number in range(count) if only is None else [only]:
            end, wrong = tried(number, seed, place)
            ends[end] += 1
            found += [wrong] if wrong else []
        files_for_processes(Path(root))
        for number in range(processes):
            end, wrong = run_as_a_process(number, seed, Path(root))
            ends[end] += 1
            found += [wrong] if wrong else []
    return ends, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--processes", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this one alone")
    arguments = parser.parse_args()
    ends, found = fuzz(arguments.count, arguments.processes, arguments.seed, arguments.only)
    for end, times in sorted(ends.items()):
        print(f"{times:4d} {end}")
    for wrong in found:
        print(f"\n{wrong}")
    print(json.dumps({"inputs": ends.total(), "wrong": len(found)}))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
