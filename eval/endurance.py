"""Kills `python -m eval` at random moments and checks that the resumed run gives the scores of one that was left alone.

python -m eval.endurance --times 20

Every run is a process of its own, ended by SIGKILL at a moment drawn from the time an undisturbed run takes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from eval.cells import TASKS
from eval.families import FAMILIES
from shared.errors import run_main

KEPT = (
    "results",
    "versions",
    "n-samples",
    "higher_is_better",
)  # of lm-eval's results file: what does not tell the time
_PRELOADED = ["eval.model", "eval.code_eval", "lm_eval.evaluator", "lm_eval._cli", "datasets", "transformers"]


def command(task: str, limit: int, folder: Path, device: str = "cpu") -> list[str]:
    """The flags of the run under test."""
    model = f"family=SDAR,pretrained={FAMILIES['SDAR'].shipped},preset=tiny,dtype=float32"
    return ["--model", "dllm", "--model_args", model, "--tasks", task, "--limit", str(limit), "--batch_size", "4",
            "--apply_chat_template", "--device", device, "--output_path", str(folder / "run")]  # fmt: skip


def run_cli(flags: list[str]) -> None:
    """`python -m eval` in this process, quietly, looking for tasks in this repository only (the whole index takes ten seconds)."""
    from lm_eval.tasks import TaskManager

    from eval.__main__ import main

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.argv = ["eval", "run", *flags]
    known = TaskManager.__init__
    TaskManager.__init__ = lambda self, *a, **k: known(self, include_path=str(TASKS), include_defaults=False)
    main()


def processes():
    """A context whose processes start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def scores(folder: Path) -> dict:
    """The newest results file, less what tells the time."""
    newest = max(folder.rglob("results_*.json"), key=lambda p: p.stat().st_mtime_ns)
    found = json.loads(newest.read_text(encoding="utf-8"))
    decoding = {k: v for k, v in found["config"]["decoding"].items() if k not in ("seconds_in_flight", "lossless")}
    return {**{k: found[k] for k in KEPT}, "decoding": decoding}


def finish(context, flags: list[str]) -> None:
    """Run to the end; raises where the run fails."""
    child = context.Process(target=run_cli, args=(flags,))
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"the run ended with {child.exitcode}")


def kill(context, flags: list[str], seconds: float) -> bool:
    """Start the run and kill it after so many seconds; was it still alive?"""
    child = context.Process(target=run_cli, args=(flags,))
    child.start()
    child.join(seconds)
    alive = child.is_alive()
    child.kill()
    child.join()
    return alive


def trial(times: int, *, task: str = "instructions", limit: int = 24, seed: int = 0) -> list[dict]:
    """One record a kill: after how many seconds, how many texts were on disk, and whether the scores were the same."""
    context, rng, found = processes(), random.Random(seed), []
    with tempfile.TemporaryDirectory() as root:
        whole = Path(root) / "whole"
        finish(context, command(task, 2, Path(root) / "warm"))
        began = time.perf_counter()
        finish(context, command(task, limit, whole))
        took, wanted = time.perf_counter() - began, scores(whole)
        for k in range(times):
            folder, after = Path(root) / str(k), rng.uniform(0.0, took)
            flags = command(task, limit, folder)
            alive = kill(context, flags, after)
            left = sum(p.read_bytes().count(b"\n") for p in folder.rglob("predictions-*.jsonl"))
            finish(context, [*flags, "--resume"])
            found.append({"after": round(after, 3), "alive": alive, "texts": left, "same": scores(folder) == wanted})
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--task", default="instructions")
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    found = trial(args.times, task=args.task, limit=args.limit, seed=args.seed)
    for k, r in enumerate(found):
        print(
            f"{k}: killed after {r['after']:.2f} s, {r['texts']} texts on disk: {'the same scores' if r['same'] else 'OTHER SCORES'}"
        )
    print(
        json.dumps(
            {"times": len(found), "alive": sum(r["alive"] for r in found), "same": sum(r["same"] for r in found)}
        )
    )


if __name__ == "__main__":
    run_main(main)
