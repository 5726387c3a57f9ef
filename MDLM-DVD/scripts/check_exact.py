"""Are the texts of `verify_exact` those of the verifier alone, and those of the cascade its own at block size one, whoever drafts? On held-out problems.

python scripts/check_exact.py --problems 256                     # three tasks; some minutes of a core for 8 problems
python scripts/check_exact.py --problems 256 --share 3 15        # the fourth of fifteen parts

Prints one JSON line: texts that are equal, of how many, by decoder and drafter.
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.errors import end_on_interrupt

    end_on_interrupt()

import json
from collections.abc import Sequence

from mdlm_dvd.src.model import Pool
from mdlm_dvd.src.registry import HOME, ModelRegistry
from mdlm_dvd.src.runtime import run
from shared.errors import Parser, UserError, run_main

TASKS = ("word_problems", "functions", "instructions")
DRAFTERS = ("tiny_drafter", "tiny_verifier", "sdar_tiny")
CHECKS = {
    "verify_exact": ("llada", {"steps": 32}),
    "cascade": ("cascade", {"draft_steps": 0}),
}


def check(prompts: Sequence[str], batch_size: int) -> dict[str, dict[str, int]]:
    """How many texts are equal, by decoder and drafter."""
    registry, pool, found = ModelRegistry(), Pool({"device": "cpu", "dtype": "float32"}), {}
    verifier = registry.load("tiny_verifier", "verifier", pool)
    how = {"gen_length": 128, "block_length": 32, "batch_size": batch_size}
    for name, (alone, options) in CHECKS.items():
        own = run(
            registry.load("tiny_drafter", "drafter", pool),
            verifier,
            registry.algorithm(alone),
            prompts,
            **how,
            **options,
        )
        steps = {k: v for k, v in options.items() if k == "steps"}
        for drafter in DRAFTERS:
            broker = registry.load(drafter, "drafter", pool)
            texts = run(broker, verifier, registry.algorithm(name), prompts, **how, **steps)
            equal = sum(a.token_ids == b.token_ids for a, b in zip(texts, own, strict=True))
            found.setdefault(name, {})[drafter] = equal
    return found


def run_check(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--problems", type=int, default=256, help="of each task (256)")
    parser.add_argument("--share", type=int, nargs=2, default=[0, 1], metavar=("K", "N"), help="the K-th of N parts")
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args(argv)
    part, parts = args.share
    if not 0 <= part < parts or args.problems < 1 or args.batch_size < 1:
        raise UserError(
            f"share is {part} of {parts}, problems {args.problems}. Allowed: 0 <= K < N, at least one problem"
        )
    lines = [
        line
        for task in TASKS
        for line in (HOME.parent / f"eval/tasks/{task}.jsonl").read_text(encoding="utf-8").splitlines()[: args.problems]
    ]
    prompts = [json.loads(line)["prompt"] for line in lines][part::parts]
    print(json.dumps({"texts": len(prompts), "equal": check(prompts, args.batch_size)}))


def main(argv: Sequence[str] | None = None) -> None:
    """Run; bad input is one line on standard error and exit code 2."""
    run_main(lambda: run_check(argv))


if __name__ == "__main__":
    main()
