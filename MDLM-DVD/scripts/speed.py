"""Speed of a drafter and a verifier at the shapes of released checkpoints: random weights, acceptance by a script, next to the machine's measured limits.

python scripts/speed.py --json results/speed.json                       # Fast-dLLM-v2-7B drafts for LLaDA-8B, on a GPU
python scripts/speed.py --tiny --accept 4 --gen_length 32               # random weights of the shipped pair's size, anywhere

Random weights accept nothing, so ``--accept N`` keeps the first N tokens of every draft whatever the verifier says. The drafter has the verifier's vocabulary,
which the released one does not: its head is a sixth smaller than that. Prints a table, then one JSON line.
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.errors import end_on_interrupt

    end_on_interrupt()

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from mdlm_dvd import decoding
from mdlm_dvd.src.network import Network
from mdlm_dvd.src.texts import Ask, Texts
from mdlm_dvd.verification_algos import ACCEPT_RULES, Claim, Judged
from shared.errors import Parser, UserError, run_main
from shared.family import FAMILIES
from shared.network.loading import resolve_device
from shared.network.sizes import sizes_of
from shared.options import Runtime
from shared.scripts.files import check_file, write_whole


def load(tiny: bool, device: torch.device, dtype: torch.dtype) -> dict[str, Network]:
    """Both networks with random weights."""
    from eval.shapes import random_model

    verifier = FAMILIES["D2F"]
    small = {"vocab_size": 1024, "mask_token_id": 1023, "num_attention_heads": 4}
    shape = dict(verifier.shapes["llada-8b"]["model"])
    if tiny:
        shape |= {**small, "hidden_size": 128, "intermediate_size": 336, "num_hidden_layers": 5}
    large = random_model(verifier.networks["model"].model_class, shape, device, dtype)
    if tiny:
        shape |= {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 3}
        return {"verifier": Network(large), "drafter": Network(random_model(type(large), shape, device, dtype), 32)}
    family = FAMILIES["Fast-dLLM-v2"]
    shape = {
        **family.shapes["fast-dllm-v2-7b"]["model"],
        "vocab_size": large.config.vocab_size,
        "mask_token_id": 126336,
    }
    fast = random_model(family.networks["model"].model_class, shape, device, dtype)
    return {"verifier": Network(large), "drafter": Network(fast, 32, from_prompt=False, next_token=True)}


def scripted(accept: int):
    """An accept rule that keeps the first ``accept`` drafts of each text."""

    def rule(claim: Claim, **_) -> Judged:
        return Judged(claim.drafted & (claim.drafted.cumsum(-1) <= accept), claim.tokens)

    return rule


@torch.inference_mode()
def passes(models: dict[str, Network], machine, rows: int, context: int, gen_length: int) -> list[dict]:
    """Milliseconds of each kind of pass, with half of the region decided, and the floor of the same work."""
    from eval.roofline import timed

    device, found = models["verifier"].device, []
    mask_id = models["verifier"].model.config.mask_token_id
    prompts = [[1 + k % 100 for k in range(context)]] * rows
    for role, name in (("verifier", "whole"), ("verifier", "ordered"), ("drafter", "cached"), ("drafter", "whole")):
        texts = Texts(prompts, Ask(gen_length, mask_id, device=device, whole=True))
        texts.canvas.tokens[:, context : context + gen_length // 2] = 5
        everyone, forward = list(range(rows)), getattr(models[role], name)
        forward(texts, everyone, texts.region(everyone))
        spent = forward(texts, everyone, texts.region(everyone))[1]
        seconds = timed(lambda f=forward, t=texts, e=everyone: f(t, e, t.region(e)), device, repeat=10)
        one = spent[0]
        together = one._replace(
            tokens=one.tokens * rows, logits=one.logits * rows, context=one.context * rows, pairs=one.pairs * rows
        )
        floor = machine.floor(sizes_of(models[role].model).work(together))
        found.append(
            {
                "pass": f"{role}, {name}",
                "rows": rows,
                "tokens": one.tokens,
                "ms": 1e3 * seconds,
                "floor_ms": 1e3 * floor,
            }
        )
    return found


def decodes(models: dict[str, Network], rows: int, context: int, gen_length: int, accept: int) -> list[dict]:
    """Tokens per second of whole decodes."""
    prompts = [[1 + (7 * k + r) % 100 for k in range(context)] for r in range(rows)]
    how = {"max_new_tokens": gen_length, "truncate_at_eos": False, "block_length": 32}
    kept = ACCEPT_RULES["exact"]
    runs = {
        "verifier token by token": lambda: decoding.cascade(models["verifier"], prompts, drafter=models["drafter"], draft_steps=0, **how),
        "verifier, a quarter of the steps": lambda: decoding.llada_generate(models["verifier"], prompts, steps=gen_length // 4, **how),
        f"cascade, {accept} accepted by script": lambda: decoding.cascade(models["verifier"], prompts, drafter=models["drafter"], **how),
        f"its own drafter, {accept} accepted by script": lambda: decoding.cascade(models["verifier"], prompts, drafter=models["verifier"], **how),
    }  # fmt: skip
    found = []
    try:
        ACCEPT_RULES["exact"] = scripted(accept)
        for name, run in runs.items():
            run()
            start = time.perf_counter()
            out = run()
            seconds = time.perf_counter() - start
            lanes = {lane: sum(s.forwards for s in kinds.values()) for lane, kinds in out.batch.items()}
            found.append(
                {
                    "decode": name,
                    "rows": rows,
                    "tokens_per_second": out.token_count / seconds,
                    "passes": lanes,
                    "seconds": seconds,
                }
            )
    finally:
        ACCEPT_RULES["exact"] = kept
    return found


def run(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="random weights of the shipped pair's size")
    parser.add_argument("--accept", type=int, default=5, help="drafts kept a round (5)")
    parser.add_argument("--context", type=int, default=128, help="tokens of the prompt (128)")
    parser.add_argument("--gen_length", type=int, default=128, help="tokens of the region (128)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="texts at a time (1)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--fast", choices=("true", "false"), help="our kernels; default: where they can run")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args(argv)
    for name in ("accept", "context", "gen_length"):
        if getattr(args, name) < 1:
            raise UserError(f"{name} is {getattr(args, name)}. Allowed: a whole number, at least 1")
    if args.json:
        check_file("json", args.json)
    from eval.roofline import Machine

    device = resolve_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    machine, models = Machine.measure(device, dtype), load(args.tiny, device, dtype)
    for network in models.values():
        network.runtime = Runtime(fast=None if args.fast is None else args.fast == "true")
    figures = {"machine": machine.to_json(), "passes": [], "decodes": []}
    for rows in args.batch:
        for found in passes(models, machine, rows, args.context, args.gen_length):
            figures["passes"].append(found)
            over = found["ms"] / found["floor_ms"]
            print(
                f"{found['pass']:22s} {rows:3d} x {found['tokens']:4d} tokens {found['ms']:9.3f} ms   floor {found['floor_ms']:8.3f}   {over:5.2f} x"
            )
        for found in decodes(models, rows, args.context, args.gen_length, args.accept):
            figures["decodes"].append(found)
            print(
                f"{found['decode']:42s} {rows:3d} texts {found['tokens_per_second']:9.1f} tokens/s   passes {found['passes']}"
            )
    line = json.dumps(figures)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.json, line + "\n")
    print(line)


def main(argv: Sequence[str] | None = None) -> None:
    """Run; bad input is one line on standard error and exit code 2."""
    run_main(lambda: run(argv))


if __name__ == "__main__":
    main()
