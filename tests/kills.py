"""Runs that are killed at random moments and go on: nothing is lost, nothing stands twice, and the result is that of a run left alone.

python -m tests.kills --times 20 --seed 0

Killed are a script in two processes, `python -m eval`, and `python -m eval.compare`: with SIGKILL, between the start and the last text. The processes start
with everything imported, as `eval.endurance` starts them. Of the script's two, now and then one dies first, and a new run is refused while the other lives.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from eval import compare
from eval.endurance import command, processes, run_cli, scores
from sdar.generate_ssd_policy import SCRIPT

TEXTS = 8  # of a script
GRID = {"name": "kills", "tasks": ["instructions"], "problems": 4, "batch_size": 2, "dtype": "float32", "baseline": "one", "calibrate": 2, "runs": [
    {"decoder": "standard", "name": "one", "options": {"block_length": 1}}, {"decoder": "ssd_policy", "preset": "tiny", "name": "two"}]}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What is killed. ``start(folder, again)`` starts its processes, ``records`` are the lines that it keeps, by name, with ``key``, ``result`` is what counts."""

    name: str
    start: Callable[[Path, bool], list[BaseProcess]]
    records: str
    key: str
    texts: int
    result: Callable[[Path], object]


def logged(log: str, environment: dict[str, str], call: Callable, *arguments) -> None:
    """``call`` in this process, what it prints going to ``log``."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    call(*arguments)


def started(context, folder: Path, call: Callable, arguments: tuple, size: int = 1) -> list[BaseProcess]:
    """``size`` processes of ``call``, which find each other as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    found = []
    for rank in range(size):
        place = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}
        found.append(context.Process(target=logged, args=(f"{folder}.{rank}.log", place, call, *arguments)))
        found[-1].start()
    return found


def run_script(words: list[str]) -> None:
    SCRIPT.main(words)


def script_of(context) -> Subject:
    def start(folder: Path, again: bool) -> list[BaseProcess]:
        prompts = folder.parent / "prompts.jsonl"
        prompts.write_text(
            "".join(
                json.dumps({"prompt": f"Tom has {k} toys. He buys {k} toys. How many now?"}) + "\n"
                for k in range(TEXTS)
            )
        )
        words = [
            "--prompt_file",
            str(prompts),
            "--max_new_tokens",
            "48",
            "--dtype",
            "float64",
            "--device",
            "cpu",
            "--output_dir",
            str(folder),
        ]
        return started(context, folder, run_script, (words,), 2)

    def result(folder: Path) -> dict:
        return {
            r["index"]: (r["token_ids"], r["forwards"])
            for lines in kept(folder, "outputs*.jsonl").values()
            for r in map(json.loads, lines)
        }

    return Subject("script in two processes", start, "outputs*.jsonl", "index", TEXTS, result)


def eval_of(context) -> Subject:
    def start(folder: Path, again: bool) -> list[BaseProcess]:
        flags = [*command("instructions", TEXTS, folder), *(["--resume"] if again else [])]
        return started(context, folder, run_cli, (flags,))

    return Subject("python -m eval", start, "predictions*.jsonl", "key", TEXTS, scores)


def compare_of(context) -> Subject:
    def start(folder: Path, again: bool) -> list[BaseProcess]:
        (folder.parent / "grid.yaml").write_text(json.dumps(GRID))
        words = [str(folder.parent / "grid.yaml"), "--output", str(folder), "--device", "cpu"]
        return started(context, folder, compare.main, (words,))

    def result(folder: Path) -> list[dict]:
        rows = json.loads((folder / "results.json").read_text())["rows"]
        return [{k: v for k, v in row.items() if "second" not in k} for row in rows]

    return Subject("python -m eval.compare", start, "*.jsonl", "key", 2 * GRID["problems"], result)


SUBJECTS = {"script": script_of, "eval": eval_of, "compare": compare_of}


def kept(folder: Path, name: str) -> dict[Path, list[bytes]]:
    """The whole lines of every file of that name."""
    files = [p for p in sorted(folder.rglob(name)) if not p.name.startswith("samples")]
    return {p: [line for line in p.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")] for p in files}


def ended(running: list[BaseProcess]) -> list[int]:
    for process in running:
        process.join()
    return [process.exitcode for process in running]


def words_of(folder: Path) -> str:
    return "".join(p.read_text(errors="replace")[-600:] for p in sorted(folder.parent.glob(f"{folder.name}.*.log")))


def kill(subject: Subject, folder: Path, rng: random.Random, counts: Counter) -> str | None:
    """Start and kill; what is wrong with how a new run is met while one of two processes lives."""
    texts, later, one_first = rng.randrange(subject.texts), rng.uniform(0, 0.3), rng.random() < 0.3
    running = subject.start(folder, False)
    while sum(map(len, kept(folder, subject.records).values())) < texts and all(p.is_alive() for p in running):
        running[0].join(0.002)
    running[0].join(later)
    order = rng.sample(running, len(running))
    for process in order[: len(order) - 1 if one_first else None]:
        process.kill()
        process.join()
    wrong = None
    if one_first and len(order) > 1:
        rest, held = order[-1], (folder / ".lock").exists() and bool(kept(folder, subject.records))
        second = subject.start(folder, True)
        codes = ended(second[:1])
        alive = held and rest.is_alive()
        counts["refused beside a living process"] += alive and codes == [2]
        if alive and codes != [2]:
            wrong = f"a new run beside a living process ended with {codes}: {words_of(folder)}"
        for process in (*second, rest):
            process.kill()
    for process in running:
        process.kill()
        process.join()
    return wrong


def trial(subject: Subject, times: int, seed: int, root: Path) -> tuple[Counter, list[str]]:
    """How far the killed runs had come, and what is wrong with those that went on."""
    root.mkdir()
    whole, found, counts = root / "whole", [], Counter()
    codes = ended(subject.start(whole, False))
    if any(codes):
        return counts, [f"{subject.name}: the undisturbed run ended with {codes}: {words_of(whole)}"]
    wanted = subject.result(whole)
    for number in range(times):
        folder, rng = root / str(number), random.Random(f"{seed} {subject.name} {number}")
        wrong = kill(subject, folder, rng, counts)
        before = kept(folder, subject.records)
        left = sum(map(len, before.values()))
        counts["kills"] += 1
        counts["nothing yet" if not left else "some texts" if left < subject.texts else "all texts"] += 1
        codes = ended(subject.start(folder, folder.exists()))
        after = kept(folder, subject.records)
        if any(codes):
            wrong = wrong or f"the resumed run ended with {codes}: {words_of(folder)}"
        elif lost := [p.name for p, lines in before.items() if after.get(p, [])[: len(lines)] != lines]:
            wrong = wrong or f"lost lines of {lost}"
        elif twice := repeated(after, subject.key):
            wrong = wrong or f"twice: {twice}"
        elif subject.result(folder) != wanted:
            wrong = wrong or "another result"
        found += [f"{subject.name} {number}, killed with {left} lines: {wrong}"] if wrong else []
    return counts, found


def repeated(files: dict[Path, list[bytes]], key: str) -> list:
    """Records that stand twice in the files of one folder."""
    seen = Counter(
        (p.parent, p.name.partition(".")[0], json.loads(line)[key]) for p, lines in files.items() for line in lines
    )
    return [name for (_, _, name), times in seen.items() if times > 1]


def kills(names: list[str], times: int, seed: int) -> tuple[dict[str, Counter], list[str]]:
    context, counts, found = processes(), {}, []
    with tempfile.TemporaryDirectory() as root:
        for name in names:
            counts[name], wrong = trial(SUBJECTS[name](context), times, seed, Path(root) / name)
            found += wrong
    return counts, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="kills of each")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.perf_counter()
    counts, found = kills(arguments.subjects, arguments.times, arguments.seed)
    for name, reached in counts.items():
        print(f"{name}: {dict(reached)}")
    for wrong in found:
        print(f"\n{wrong}")
    print(
        json.dumps(
            {
                "kills": sum(c["kills"] for c in counts.values()),
                "wrong": len(found),
                "seconds": round(time.perf_counter() - began),
            }
        )
    )
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
