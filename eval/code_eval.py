"""The metric ``code_eval``, which humaneval and mbpp would fetch from a hub, by `shared.scripts.sandbox`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import LazyLoader, find_spec, module_from_spec
from math import comb
from types import ModuleType

from shared.scripts import sandbox


class CodeEval:
    """What ``evaluate.load("code_eval")`` returns, as far as lm-eval's tasks use it."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,), **limits
    ):
        """``({"pass@k": share}, {problem: [passed, ...]})``. Passed: prediction and test together run to their end."""
        results = {
            i: [
                sandbox.solves(sandbox.run(f"{candidate}\n{test}", sandbox.Limits(**limits)))
                for candidate in candidates
            ]
            for i, (test, candidates) in enumerate(zip(references, predictions, strict=True))
        }
        enough = [n for n in k if all(len(r) >= n for r in results.values())]
        return {
            f"pass@{n}": sum(pass_at(len(r), sum(r), n) for r in results.values()) / len(results) for n in enough
        }, results


def pass_at(samples: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of ``k`` samples is right (Chen et al. 2021, equation 1)."""
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def install() -> None:
    """``evaluate.load("code_eval")`` gives ours from now on; every other metric comes from where it came."""
    imported_when_used("evaluate").load = load


def load(path: str, *arguments, **keywords):
    from evaluate.loading import load as published

    return CodeEval() if path == "code_eval" else published(path, *arguments, **keywords)


def imported_when_used(name: str) -> ModuleType:
    """The module, run only once something is read from it: `evaluate` takes seconds, and few tasks need it."""
    if name not in sys.modules:
        spec = find_spec(name)
        spec.loader = LazyLoader(spec.loader)
        module = sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]
