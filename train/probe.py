"""Is a checkpoint any good? Held-out problems, decoded greedily by its family's own decoders: the baseline, plain and exact speculation.

For a sweep over settings see `eval.compare`; this draws other problems, and needs no lm-eval.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from shared.family import DecoderSetting, Family
from shared.output import Output
from shared.scripts import judging, sandbox
from shared.scripts.models import other_models
from train.problem import Problem
from train.tasks import TASKS, held_out
from train.tokenizer import chat_prompt

NEW_TOKENS = 256
BATCH_SIZE = 64


def settings_of(family: Family) -> dict[str, DecoderSetting]:
    """What the family's description holds a checkpoint to, the baseline first."""
    found = {"baseline": family.baseline, "plain": family.plain, "exact": family.exact}
    return {name: setting for name, setting in found.items() if setting is not None}


def decode(family: Family, setting: DecoderSetting, models: Mapping, prompts: Sequence[list[int]], tokenizer) -> Output:
    """The answers to ``prompts``, each of at most `NEW_TOKENS`."""
    decoder = family.decoders[setting.decoder]
    options = decoder.options_class.from_flat({"max_new_tokens": NEW_TOKENS}, **setting.options)
    others = other_models(family, setting.decoder, models)
    return decoder.generate(
        models[family.first], prompts, options, tokenizer=tokenizer, batch_size=min(BATCH_SIZE, len(prompts)), **others
    )


def runs(program: str) -> bool:
    """Does a program exit with 0? Model-written code: it runs confined."""
    return sandbox.solves(sandbox.run(program))


def judge(problems: Sequence[Problem], texts: Sequence[str]) -> list[bool]:
    """Which of ``texts`` solve their problem."""
    solved = lambda problem, text: bool(judging.meets_check(problem.check, text, runs))  # noqa: E731
    with ThreadPoolExecutor() as pool:
        return list(pool.map(solved, problems, texts))


def probe(
    family: Family, models: Mapping, tokenizer, *, count: int, seed: int, run_code: bool, tasks: Iterable[str] = TASKS
) -> list[dict]:
    """One row per task and setting: accuracy in percent, forwards per token, texts equal to the baseline's. Functions only when ``run_code``."""
    rows = []
    for task in tasks:
        problems = held_out(task, count, seed)
        if judging.needs_run(problems[0].check) and not run_code:
            continue
        prompts = tokenizer([chat_prompt(p.prompt) for p in problems]).input_ids
        outputs = {n: decode(family, s, models, prompts, tokenizer) for n, s in settings_of(family).items()}
        first = outputs["baseline"].texts
        for name, output in outputs.items():
            same = sum(a == b for a, b in zip(output.texts, first, strict=True))
            rows.append(
                {
                    "task": task,
                    "decoder": name,
                    "accuracy": round(100 * sum(judge(problems, output.texts)) / count, 1),
                    "forwards_per_token": round(output.forwards_per_token, 3),
                    "same_as_baseline": round(100 * same / count, 1),
                    "lossless": bool(output.lossless),
                }
            )
    return rows


def table(rows: Sequence[dict]) -> str:
    """Decoders down, tasks across: accuracy @ forwards per token."""
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    cell = {(r["decoder"], r["task"]): f"{r['accuracy']:.1f} @ {r['forwards_per_token']:.3f}" for r in rows}
    lines = [f"| decoder | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    decoders = dict.fromkeys(r["decoder"] for r in rows)
    return "\n".join(lines + [f"| {d} | {' | '.join(cell[d, t] for t in tasks)} |" for d in decoders])
