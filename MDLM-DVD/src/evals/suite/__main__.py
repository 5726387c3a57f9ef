"""The evaluation suite of DualDiffusion. Without ``--config``: a small one on the models that ship, which needs no network.

python -m mdlm_dvd.src.evals.suite --config tiny
python -m mdlm_dvd.src.evals.suite --config full_suite --output_dir eval_results/full
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.errors import end_on_interrupt

    end_on_interrupt()

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mdlm_dvd.src.evals.suite import config as configs
from mdlm_dvd.src.evals.suite import problems
from mdlm_dvd.src.evals.suite.decoders import Pair
from mdlm_dvd.src.evals.suite.driver import evaluate
from mdlm_dvd.src.registry import ModelRegistry
from shared.errors import Parser, UserError, run_main
from shared.scripts.files import check_writable


def parser() -> argparse.ArgumentParser:
    """Every flag."""
    how = argparse.RawDescriptionHelpFormatter
    made = Parser(
        prog="python -m mdlm_dvd.src.evals.suite", description=__doc__, formatter_class=how, allow_abbrev=False
    )
    made.add_argument("--config", default="tiny", help="a JSON file, or one that ships, by its name")
    made.add_argument("--output_dir", help="default: eval_results/ and the name of the experiment")
    made.add_argument(
        "--limit", type=int, help="the first problems of each data set only; default: what the configuration says"
    )
    made.add_argument(
        "--confirm_run_unsafe_code", action="store_true", help="let functions that a model wrote be run, confined"
    )
    return made


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    asked = parser().parse_args(argv)
    config = configs.load(asked.config)
    if asked.limit is not None:
        if asked.limit < 1:
            raise UserError(f"limit is {asked.limit}. Allowed: at least 1")
        config = replace(config, datasets={name: configs.DataSet(asked.limit) for name in config.datasets})
    folder = Path(asked.output_dir or Path("eval_results") / config.experiment_name)
    check_writable(folder)
    registry = ModelRegistry(config.registry)
    registry.algorithm(config.algorithm)
    for name in (config.drafter, config.verifier):
        registry.model(name)
    for name in config.datasets:
        problems.check(name, asked.confirm_run_unsafe_code)
    pair = Pair(registry, config.drafter, config.verifier, device=config.device, dtype=config.dtype)
    how = {"run_unsafe_code": asked.confirm_run_unsafe_code}
    found = {name: problems.load(name, data.limit, **how) for name, data in config.datasets.items()}
    command = shlex.join(["python", "-m", "mdlm_dvd.src.evals.suite", *argv])
    results = evaluate(config, pair, found, folder, command)
    print((folder / "README.md").read_text(encoding="utf-8"))
    print(f"{len(results['all_runs'])} runs in {folder}")


if __name__ == "__main__":
    run_main(main)
