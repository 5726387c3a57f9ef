"""How often the fast forward changes a text: the same problems by the plain network and by kernels in CUDA graphs.

python -m eval.agreement --dtype bfloat16        # on a GPU

In float32 the two agree token for token (a test says so). In bfloat16 they round differently, and greedy decoding turns
a near-tie into another text. Prints, per decoder, the share of texts that are equal and the share of tokens before the
first difference; one JSON line last.
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.errors import end_on_interrupt

    end_on_interrupt()

import argparse
import json
from functools import partial
from pathlib import Path

from eval.shapes import family_of
from shared.errors import Parser, run_main
from shared.family import FAMILIES, Family
from shared.gpu.fast import fast_forward_of
from shared.network.loading import load_tokenizer, resolve_device
from shared.scripts.models import checkpoints_of, load_models, other_models
from shared.scripts.prompts import encode_prompt, read_prompt_file


def settings_of(family: Family) -> dict:
    """What is decoded both ways, by name."""
    found = {"plain": family.plain, f"{family.method}, exact": family.exact, "baseline": family.baseline}
    return {name: setting for name, setting in found.items() if setting is not None}


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading tokens two texts share."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def compare(decode, prompts, **flat) -> dict:
    """Texts of the plain network against those of the fast one."""
    plain = decode(prompts, fast=False, **flat).tokens
    fast = decode(prompts, **flat).tokens
    shared = sum(common_prefix(a, b) for a, b in zip(plain, fast, strict=True))
    return {
        "texts": len(plain),
        "equal": sum(a == b for a, b in zip(plain, fast, strict=True)),
        "tokens_before_first_difference": shared / max(1, sum(map(len, plain))),
    }


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, help="default: that of the model, else the default one")
    parser.add_argument("--model", help="a checkpoint (default: the family's shipped one)")
    parser.add_argument("--problems", type=int, default=128, help="of each task")
    parser.add_argument("--block_length", type=int, help="default: the benchmark's for the family")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args(argv)
    family = family_of(args.family, None, args.model)
    source = args.model or f"{family.name}/{next(iter(family.shipped))}"
    models = load_models(family, checkpoints_of(family, source), dtype=args.dtype, device=resolve_device(args.device))
    for model in models.values():
        fast_forward_of(model, required=True)
    tokenizer = load_tokenizer(models[family.first].folder)
    files = sorted((Path(__file__).parent / "tasks").glob("*.jsonl"))
    records = [record for file in files for record in read_prompt_file(file)[: args.problems]]
    prompts = [encode_prompt(tokenizer, record) for record in records]
    rows = {}
    for name, setting in settings_of(family).items():
        decoder = family.decoders[setting.decoder]
        flat = {"block_length": args.block_length or family.block_length, "max_new_tokens": 192} | dict(setting.options)
        known = {k: v for k, v in flat.items() if k in decoder.options_class.names()}
        call = {"batch_size": args.batch_size, **other_models(family, setting.decoder, models)}
        rows[name] = compare(partial(decoder.generate, models[family.first]), prompts, **known, **call)
        r = rows[name]
        print(
            f"{name:20s} {r['equal']}/{r['texts']} texts equal, "
            f"{100 * r['tokens_before_first_difference']:.2f} % of tokens before a difference"
        )
    print(json.dumps({"model": source, "dtype": args.dtype, "decoders": rows}))


if __name__ == "__main__":
    run_main(main)
