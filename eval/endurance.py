"""Kills `python -m eval` at random moments and checks that the resumed run gives the scores of one that was left alone.

python -m eval.endurance --times 20

Every run is a process of its own, ended by SIGKILL somewhere between its first text and its last.
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.errors import end_on_interrupt

    end_on_interrupt()

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
from pathlib import Path

from shared.errors import Parser, run_main
from shared.family import default_family, family_named

KEPT = (
    "results",
    "versions",
    "n-samples",
    "higher_is_better",
)  # of lm-eval's results file: what does not tell the time
_NOT_KEPT = ("seconds_in_flight", "lossless", "lossless_reason", "lossless_relative_to")  # of what it says of decoding
_PRELOADED = ["eval.model", "lm_eval.evaluator", "lm_eval._cli", "datasets"]


def command(task: str, limit: int, folder: Path, device: str = "cpu") -> list[str]:
    """The flags of the run under test."""
    family = family_named(default_family())
    model = f"family={family.name},pretrained={family.tiny},preset=tiny,dtype=float32"
    return ["--model", "dllm", "--model_args", model, "--tasks", task, "--limit", str(limit), "--batch_size", "4",
            "--apply_chat_template", "--device", device, "--output_path", str(folder / "run")]  # fmt: skip


def run_cli(flags: list[str], log: str | None = None) -> None:
    """`python -m eval` in this process, without lm-eval's slow questions to pip; ``log`` takes what it prints."""
    import lm_eval.evaluator

    from eval.__main__ import main

    if log:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
    sys.argv = ["eval", "run", *flags]
    lm_eval.evaluator.add_env_info = lambda results: None
    main()


def processes():
    """A context whose processes start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    family = family_named(default_family())
    decoder = next(iter(family.decoders.values()))
    context.set_forkserver_preload([*_PRELOADED, decoder.function.partition(":")[0]])
    return context


def scores(folder: Path) -> dict:
    """The newest results file, less what tells the time."""
    newest = max(folder.rglob("results_*.json"), key=lambda p: p.stat().st_mtime_ns)
    found = json.loads(newest.read_text(encoding="utf-8"))
    decoding = {k: v for k, v in found["config"]["decoding"].items() if k not in _NOT_KEPT}
    return {**{k: found[k] for k in KEPT}, "decoding": decoding}


def finish(context, flags: list[str], folder: Path) -> None:
    """Run to the end; raises with its last words where the run fails."""
    log = folder.with_suffix(".log")
    child = context.Process(target=run_cli, args=(flags, str(log)))
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"the run ended with {child.exitcode}: {log.read_text()[-500:]}")


def texts_on_disk(folder: Path) -> int:
    """Finished lines of predictions."""
    return sum(p.read_bytes().count(b"\n") for p in folder.rglob("predictions*.jsonl"))


def kill(context, flags: list[str], folder: Path, texts: int, later: float) -> bool:
    """Start the run and kill it ``later`` seconds after so many texts are on disk; was it still alive?"""
    child = context.Process(target=run_cli, args=(flags, os.devnull))
    child.start()
    while texts_on_disk(folder) < texts and child.is_alive():
        child.join(0.002)
    child.join(later)
    alive = child.is_alive()
    child.kill()
    child.join()
    return alive


def trial(times: int, *, task: str = "instructions", limit: int = 24, seed: int = 0) -> list[dict]:
    """One record a kill: when, how many texts were on disk, was the run still alive, and were the scores those of a
    whole run?

    The moment is drawn: so many texts, then up to a tenth of a second more, which may be amid a forward or amid a line.
    """
    context, rng, found = processes(), random.Random(seed), []
    with tempfile.TemporaryDirectory() as root:
        whole = Path(root) / "whole"
        finish(context, command(task, limit, whole), whole)
        wanted = scores(whole)
        for k in range(times):
            folder, texts, later = Path(root) / str(k), rng.randrange(limit), rng.uniform(0.0, 0.1)
            flags = command(task, limit, folder)
            alive = kill(context, flags, folder, texts, later)
            left = texts_on_disk(folder)
            finish(context, [*flags, "--resume"], folder)
            about = {"after_texts": texts, "later": round(later, 3), "alive": alive, "texts": left}
            found.append({**about, "same": scores(folder) == wanted})
    return found


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--task", default="instructions")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    found = trial(args.times, task=args.task, limit=args.limit, seed=args.seed)
    for k, r in enumerate(found):
        verdict = "the same scores" if r["same"] else "OTHER SCORES"
        print(f"{k}: killed {r['later']:.3f} s after text {r['after_texts']}, {r['texts']} texts on disk: {verdict}")
    print(
        json.dumps(
            {"times": len(found), "alive": sum(r["alive"] for r in found), "same": sum(r["same"] for r in found)}
        )
    )


if __name__ == "__main__":
    run_main(main)
