"""How often the fast forward changes a text: the same problems decoded by the plain network and by the kernels in CUDA graphs.

python -m eval.agreement --dtype bfloat16        # on a GPU

In float32 the two agree token for token (a test says so). In bfloat16 both round, differently, and greedy decoding turns a near-tie into another text. Prints, per
decoder, the share of texts that are equal and the share of tokens before the first difference; one JSON line last.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import sdar
from sdar import SDARForCausalLM, generate, generate_ssd_policy
from shared.errors import run_main
from shared.gpu.fast import fast_forward_of
from shared.network.loading import load_tokenizer, resolve_device
from shared.scripts.prompts import encode_prompt, read_prompt_file

DECODERS = {
    "plain diffusion": (generate.block_diffusion_generate, {"confidence_threshold": 0.9}),
    "S2D2, exact": (
        generate_ssd_policy.block_diffusion_generate,
        {"do_verify_policy": "always", "acceptance": "exact", "cache_ver": True},
    ),
    "block size one": (generate.block_diffusion_generate, {"block_length": 1}),
}


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading tokens two texts share."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def compare(decode, model, prompts, **flat) -> dict:
    """Texts of the plain network against those of the fast one."""
    plain = decode(model, prompts, fast=False, **flat).tokens
    fast = decode(model, prompts, **flat).tokens
    shared = sum(common_prefix(a, b) for a, b in zip(plain, fast, strict=True))
    return {
        "texts": len(plain),
        "equal": sum(a == b for a, b in zip(plain, fast, strict=True)),
        "tokens_before_first_difference": shared / max(1, sum(map(len, plain))),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(sdar.__file__).parent / "tiny"))
    parser.add_argument("--problems", type=int, default=128, help="of each task")
    parser.add_argument("--block_length", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args(argv)
    model = SDARForCausalLM.from_pretrained(args.model, dtype=args.dtype, device=resolve_device(args.device))
    fast_forward_of(model, required=True)
    tokenizer = load_tokenizer(args.model)
    files = sorted((Path(__file__).parent / "tasks").glob("*.jsonl"))
    records = [record for file in files for record in read_prompt_file(file)[: args.problems]]
    prompts = [encode_prompt(tokenizer, record) for record in records]
    rows = {}
    for name, (decode, flat) in DECODERS.items():
        call = {"block_length": args.block_length, "max_new_tokens": 192, "batch_size": args.batch_size, **flat}
        rows[name] = compare(decode, model, prompts, **call)
        r = rows[name]
        print(
            f"{name:20s} {r['equal']}/{r['texts']} texts equal, {100 * r['tokens_before_first_difference']:.2f} % of tokens before a difference"
        )
    print(json.dumps({"model": args.model, "dtype": args.dtype, "decoders": rows}))


if __name__ == "__main__":
    run_main(main)
