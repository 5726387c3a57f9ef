"""Quality against cost for one checkpoint: a grid of decoders over the same held-out problems.

python -m eval.frontier                            # the shipped SDAR checkpoint, 256 word problems, every decoder
python -m eval.frontier --grid small --problems 32 # a few decoders, for a CPU
python -m eval.frontier --task instructions --json instructions.jsonl
python -m eval.frontier --readme SDAR/README.md    # rewrite the tables that a README makes from such files

For every setting: accuracy, forwards per token (prefill, draft, verify, commit; counted per text as if it ran alone), accepted drafts per
verify forward, tokens per second of the whole batch, and how many texts equal the greedy text of block size one. A table for people, then
one JSON line, always last.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import sdar
from sdar import SDARForCausalLM, generate, generate_ssd_policy
from sdar.options import PLAIN_PRESETS, PRESETS
from shared.errors import run_main
from shared.loading import load_tokenizer, resolve_device
from shared.output import Output
from shared.prompts import encode_prompt
from train.tasks import TASKS, held_out

DYNAMIC_THRESHOLDS = (0.6, 0.8, 0.9, 0.95, 0.99)
_SCORED = {
    "do_verify_score_type": "difference_static",
    "score_penalty_coef": 1.0,
    "token_acceptance_estimator": "soft_entropy_negexp",
}
POLICIES = {
    "always": {"do_verify_policy": "always"},
    "span>=4": {"do_verify_policy": "mask_span_length", "min_ssd_span_length": 4},
    "score": {"do_verify_policy": "score_threshold", **_SCORED},
    "hysteresis": {
        "do_verify_policy": "score_hysteresis",
        **_SCORED,
        "hysteresis_threshold_on": 1.0,
        "hysteresis_threshold_off": -0.5,
    },
    "bandit": {"do_verify_policy": "contextual_bandit_ucb"},
}


@dataclass(frozen=True)
class Setting:
    """One row of the table: a decoder with its options."""

    name: str
    decode: Callable[..., Output]
    options: dict


def grid(size: str) -> Iterator[Setting]:
    """Block size one first (every other row is compared with it), then each block length, or just the presets of the shipped checkpoint."""
    plain, s2d2 = generate.block_diffusion_generate, generate_ssd_policy.block_diffusion_generate
    yield Setting("block size one (AR)", plain, {"block_length": 1})
    if size == "presets":
        yield Setting("plain diffusion, preset tiny", plain, PLAIN_PRESETS["tiny"])
        yield Setting("S2D2, preset tiny", s2d2, PRESETS["tiny"])
        return
    for length in (16,) if size == "small" else (8, 16, 32):
        base = {"block_length": length}
        yield Setting(f"B={length} static", plain, {**base, "remasking_strategy": "low_confidence_static"})
        for threshold in (0.9,) if size == "small" else DYNAMIC_THRESHOLDS:
            yield Setting(f"B={length} dynamic {threshold}", plain, {**base, "confidence_threshold": threshold})
        for policy, flat in POLICIES.items():
            for acceptance in ("published", "exact"):
                for cache_ver in (True,) if size == "small" else (True, False):
                    if size == "small" and policy not in ("always", "span>=4"):
                        continue
                    name = f"B={length} S2D2 {policy} {acceptance}{' cache_ver' if cache_ver else ''}"
                    more = {"acceptance": acceptance, "cache_ver": cache_ver, "draft_ver": cache_ver}
                    yield Setting(name, s2d2, {**base, **flat, **more, "confidence_threshold": 0.9})


def measure(setting: Setting, model, tokenizer, prompts, problems, *, max_new_tokens: int, batch_size: int, seed: int):
    """``(figures, texts' token ids)`` of one setting. ``figures`` are `Output.summary` with accuracy."""
    output = setting.decode(
        model,
        prompts,
        batch_size=batch_size,
        tokenizer=tokenizer,
        seed=seed,
        **{"max_new_tokens": max_new_tokens, **setting.options},
    )
    task = TASKS[problems[0].task]
    right = sum(task.is_correct(p, c.text) for p, c in zip(problems, output.completions, strict=True))
    figures = {
        "setting": setting.name,
        "options": setting.options,
        "accuracy": right / len(problems),
        **output.summary(),
    }
    return figures, output.tokens


def row(figures: dict) -> str:
    tokens = max(1, figures["tokens"])
    kinds = " ".join(f"{n / tokens:.3f}" for n in figures["forwards"].values())
    accepted = f"{figures['accepted_length']:.2f}" if figures["forwards"]["verify"] else "-"
    return (
        f"{figures['setting']:44s} {100 * figures['accuracy']:5.1f}  {figures['forwards_per_token']:.3f} ({kinds})  {accepted:>6s}  "
        f"{figures['tokens_per_second']:9.1f}  {figures['same_as_block_size_one']:>4d}/{figures['texts']}"
    )


_MARKED = re.compile(r"(<!-- frontier: (\S+)(?: (.*?))? -->\n).*?(<!-- /frontier -->)", re.DOTALL)


def markdown(rows: list[dict]) -> str:
    """A table of `measure`'s figures."""
    lines = [
        "| setting | accuracy % | forwards / token | prefill, draft, verify, commit | accepted / verify | texts as block size one |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        kinds = ", ".join(f"{n / r['tokens']:.3f}" for n in r["forwards"].values())
        accepted = f"{r['accepted_length']:.1f}" if r["forwards"]["verify"] else ""
        lines.append(
            f"| {r['setting']} | {100 * r['accuracy']:.1f} | {r['forwards_per_token']:.3f} | {kinds} | {accepted} | "
            f"{r['same_as_block_size_one']} / {r['texts']} |"
        )
    return "\n".join(lines) + "\n"


def refreshed(text: str, root: Path) -> str:
    """``text`` with every table between ``<!-- frontier: FILE [PATTERN] -->`` and ``<!-- /frontier -->`` made anew from ``root / FILE``.

    ``PATTERN`` is a regular expression that the settings shown must match.
    """

    def table(match: re.Match) -> str:
        rows = [json.loads(line) for line in (root / match[2]).read_text().splitlines()]
        return match[1] + markdown([r for r in rows if re.search(match[3] or "", r["setting"])]) + match[4]

    return _MARKED.sub(table, text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(sdar.__file__).parent / "tiny"))
    judged = [name for name, task in TASKS.items() if task.is_correct is not None]
    parser.add_argument("--task", default="word_problems", choices=judged)
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--grid", default="full", choices=("full", "small", "presets"))
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", help="float32 keeps batched and single decoding equal (default)")
    parser.add_argument("--readme", nargs="+", help="rewrite the marked tables of these files and measure nothing")
    parser.add_argument("--json", help="also write one JSON line per setting to this file")
    args = parser.parse_args(argv)
    if args.readme:
        for name in args.readme:
            Path(name).write_text(refreshed(Path(name).read_text(), Path(__file__).parent.parent))
        return
    model = SDARForCausalLM.from_pretrained(args.model, dtype=args.dtype, device=resolve_device(args.device))
    tokenizer = load_tokenizer(args.model)
    problems = held_out(args.task, args.problems, seed=args.seed)
    prompts = [encode_prompt(tokenizer, {"prompt": p.prompt}) for p in problems]
    call = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size, "seed": args.seed}
    print(f"{args.model}, {args.problems} held-out {args.task}, {model.device.type}, torch {torch.__version__}")
    print(f"{'setting':44s} acc %  forwards/token (prefill draft verify commit)  accepted  tokens/s  same as AR")
    rows, baseline = [], None
    for setting in tqdm(list(grid(args.grid)), disable=not sys.stderr.isatty()):
        figures, tokens = measure(setting, model, tokenizer, prompts, problems, **call)
        baseline = baseline or tokens
        figures["same_as_block_size_one"] = sum(a == b for a, b in zip(tokens, baseline, strict=True))
        rows.append(figures)
        print(row(figures), flush=True)
    if args.json:
        Path(args.json).write_text("".join(json.dumps(r) + "\n" for r in rows))
    print(json.dumps({"model": args.model, "task": args.task, "device": model.device.type, "rows": rows}))


if __name__ == "__main__":
    run_main(main)
