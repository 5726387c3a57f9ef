"""lm-eval's tasks with a drafter, a verifier and an algorithm of the registry.

python scripts/run_evals.py --drafter tiny_drafter --verifier tiny_verifier --algorithm top_k_intersection --tasks word_problems --limit 10 --steps 20
python scripts/run_evals.py --drafter llada_8b_base --verifier llada_8b_instruct --algorithm top_k_intersection --tasks gsm8k --limit 10 --steps 20

Any other --key value goes to the algorithm and the adapters, as with main.py. Results: eval_results/ALGORITHM_VERIFIER.json, or --output_file.
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.errors import end_on_interrupt

    end_on_interrupt()

import argparse
import difflib
import importlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mdlm_dvd.main import told_unused
from mdlm_dvd.src.evals.suite.problems import OFFLINE, tasks_folder
from mdlm_dvd.src.flags import parse, pool_of
from mdlm_dvd.src.model import Pool
from shared.errors import Parser, UserError, run_main
from shared.scripts.files import check_file, write_whole

RESULTS = Path("eval_results")


def parser() -> argparse.ArgumentParser:
    """The flags that have names of their own."""
    how = argparse.RawDescriptionHelpFormatter
    made = Parser(description=__doc__, formatter_class=how, allow_abbrev=False)
    made.add_argument("--drafter", required=True, help="a model of the registry")
    made.add_argument("--verifier", required=True, help="a model of the registry")
    made.add_argument("--algorithm", required=True, help="an algorithm of the registry")
    made.add_argument(
        "--tasks",
        default="gsm8k",
        help="tasks of lm-eval, or word_problems, functions, instructions, with commas between",
    )
    made.add_argument("--num_fewshot", type=int, default=0, help="worked examples before each problem")
    made.add_argument("--limit", type=int, help="the first problems of each task only; default: all")
    made.add_argument("--steps", type=int, default=10, help="steps of the algorithm")
    made.add_argument(
        "--gen_length", type=int, default=64, help="masks behind the prompt; a task that wants less gets less"
    )
    made.add_argument("--batch_size", type=int, default=1, help="texts at a time")
    made.add_argument(
        "--output_file", help="default: eval_results/ALGORITHM_VERIFIER.json; a bare name is one in eval_results"
    )
    made.add_argument("--swap_models_each_step", action="store_true", help="keep one model at a time on the device")
    made.add_argument("--registry", help="a registry.yaml; default: the one beside main.py")
    made.add_argument("--seed", type=int, default=0, help="of every random draw")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    made.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    made.add_argument("--mc_num", type=int, default=128, help="maskings of an answer, for its log-likelihood")
    made.add_argument(
        "--no_check_greedy",
        action="store_true",
        help="do not decode answers whose log-likelihood is asked for; is_greedy is false",
    )
    made.add_argument("--strict", action="store_true", help="flags that no function takes are errors, not notes")
    made.add_argument(
        "--confirm_run_unsafe_code", action="store_true", help="let tasks run programs that a model wrote"
    )
    return made


def checked(asked: argparse.Namespace) -> None:
    """Raise `UserError` for numbers that cannot be."""
    for name in ("steps", "gen_length", "batch_size", "mc_num", "limit"):
        value = getattr(asked, name)
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}. Allowed: at least 1")
    for name in ("num_fewshot", "seed"):
        if getattr(asked, name) < 0:
            raise UserError(f"{name} is {getattr(asked, name)}. Allowed: at least 0")


def output_of(asked: argparse.Namespace) -> Path:
    """The file of the results."""
    path = Path(asked.output_file or f"{asked.algorithm}_{asked.verifier}.json")
    path = path if path.suffix == ".json" else path.with_name(f"{path.name}.json")
    return path if path.parent != Path() else RESULTS / path


def task_scores(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """One score a task: exact match by the flexible filter, else any exact match, else accuracy, else none."""
    return {task: _score(found) for task, found in results.items()}


def _score(found: Mapping[str, Any]) -> float | None:
    for start, part in (("exact_match,", "flexible"), ("exact_match,", ""), ("acc,", "")):
        for key, value in found.items():
            if key.startswith(start) and part in key and isinstance(value, (int, float)):
                return float(value)
    return None


def manager_of(names: Sequence[str]) -> Any:
    """What finds these tasks: ours, and those of lm-eval where ours are not enough, since reading its list takes seconds."""
    from lm_eval.tasks import TaskManager

    for all_tasks in (False, True):
        manager = TaskManager(include_path=str(tasks_folder()), include_defaults=all_tasks)
        missing = [name for name in names if not manager.match_tasks([name])]
        if not missing:
            return manager
    near = difflib.get_close_matches(missing[0], manager.all_tasks, n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise UserError(
        f"unknown task {missing[0]!r}{hint} Allowed: {', '.join(OFFLINE)}, or what lm-eval has (lm_eval ls tasks)"
    )


def evaluate(asked: argparse.Namespace, pool: Pool) -> dict[str, Any]:
    """Run the tasks. Names are checked before anything is loaded, models before data sets are fetched. ``pool`` holds all other flags."""
    import lm_eval

    from eval.early import in_one_line
    from mdlm_dvd.src.evals.dvd_lm_eval import DVD_LM, Swap
    from mdlm_dvd.src.evals.suite.decoders import Pair
    from mdlm_dvd.src.registry import ModelRegistry
    from shared.network.loading import resolve_device

    registry = ModelRegistry(asked.registry)
    for name in (asked.drafter, asked.verifier):
        registry.model(name)
    registry.algorithm(asked.algorithm)
    names = [name.strip() for name in asked.tasks.split(",") if name.strip()]
    importlib.import_module("eval.code_eval").install()
    manager = manager_of(names)
    device = resolve_device(asked.device)
    place = "cpu" if asked.swap_models_each_step else str(device)
    pair = Pair(registry, asked.drafter, asked.verifier, pool, device=place, dtype=asked.dtype)
    loaded = in_one_line(manager.load)(names)
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not asked.confirm_run_unsafe_code:
            raise UserError(f"task {name!r} runs model-written code. Allowed: --confirm_run_unsafe_code, other tasks")
    manager.load = lambda *_, **__: loaded  # lm-eval's own call, for the same tasks
    model = DVD_LM(
        pair,
        asked.algorithm,
        gen_length=asked.gen_length,
        steps=asked.steps,
        batch_size=asked.batch_size,
        seed=asked.seed,
        mc_num=asked.mc_num,
        check_greedy=not asked.no_check_greedy,
        swap=Swap(pair, device) if asked.swap_models_each_step else None,
    )
    began = time.perf_counter()
    found = lm_eval.simple_evaluate(
        model,
        tasks=names,
        num_fewshot=asked.num_fewshot,
        limit=asked.limit,
        task_manager=manager,
        log_samples=False,
        random_seed=asked.seed,
        numpy_random_seed=asked.seed,
        torch_random_seed=asked.seed,
        fewshot_random_seed=asked.seed,
        confirm_run_unsafe_code=asked.confirm_run_unsafe_code,
    )
    seconds = time.perf_counter() - began
    return {
        "config": {
            **vars(asked),
            **pool.shared,
            **{f"{r}.{k}": v for r, values in pool.by_role.items() for k, v in values.items()},
        },
        "results": found["results"],
        "dvd_metrics_average": model.averages(),
        "task_scores": task_scores(found["results"]),
        "eval_time": seconds,
        "task_samples": {task: n["effective"] for task, n in found["n-samples"].items()},
    }


def main(argv: Sequence[str] | None = None) -> None:
    asked, rest = parser().parse_known_args(argv)
    checked(asked)
    path = output_of(asked)
    check_file("output_file", path)
    pool = pool_of(parse(rest))
    found = evaluate(asked, pool)
    told_unused(pool, asked.strict)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(found, indent=1, default=str) + "\n")
    for task, score in found["task_scores"].items():
        print(
            f"{task}: {'no score' if score is None else f'{100 * score:.1f} %'} of {found['task_samples'].get(task, '?')} problems"
        )
    for name, value in found["dvd_metrics_average"].items():
        print(f"  {name}: {value if value is None else f'{value:.4g}'}")
    print(path)


if __name__ == "__main__":
    run_main(main)
