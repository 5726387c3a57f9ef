"""How far the forwards of a model in bfloat16 are from its plain forward in float32, in log-probabilities.

python -m eval.precision --shape sdar-8b       # random weights of a named shape, on a GPU
python -m eval.precision                       # the shipped checkpoint, on what is here

One prompt is encoded, then a block is drafted and verified on top of it: by the plain network in float32 (the weights are those of bfloat16, so only arithmetic
differs), by the plain network in bfloat16, and by the fast forward in bfloat16 where it can run. The yardstick of the fast forward is the plain network at its own
precision. Prints mean and largest difference of log-probabilities over all positions and tokens; one JSON line last.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from torch import Tensor

import sdar
from eval.benchmark import prompts_of, vocabulary
from eval.subjects import SHAPES, random_model
from sdar import SDARForCausalLM
from shared.errors import run_main
from shared.gpu.engine import Engine
from shared.gpu.fast import fast_forward_of
from shared.network import masks
from shared.network.loading import resolve_device
from shared.options import Runtime

TOLERANCE = 1.25  # the fast forward's mean difference over that of the plain network in bfloat16


@torch.inference_mode()
def log_probabilities(model, runtime: Runtime, context: int, length: int) -> Tensor:
    """``[2 L, V]`` float32: of a drafted block of ``length`` L, and of the mask queries of its verify, after ``context`` tokens."""
    device, mask_id = model.device, model.special_ids()[0]
    engine = Engine(model, 1, context + 3 * length, length, runtime)
    prompt = torch.tensor(prompts_of(model, 1, context), device=device)
    positions = torch.arange(context + length, device=device)[None]
    mask = masks.block_causal(context, length, device)
    engine.forward(prompt, positions[:, :context], engine.cache.window(context, [0]), mask, logits_at=slice(0, 0))
    engine.cache.commit([context], [0])
    block = torch.randint(vocabulary(model), (1, length), generator=torch.Generator().manual_seed(1)).to(device)
    half_known = torch.where(torch.arange(length, device=device) < length // 2, block, mask_id)
    here = positions[:, context:]
    draft = engine.forward(half_known, here, engine.cache.window(length, [0]), None).float().log_softmax(-1)
    queries = torch.full_like(block, mask_id)
    two = masks.two_copy_verify(length, device)
    window = engine.cache.window(2 * length, [0])
    ids, at = torch.cat([block, queries], 1), slice(length, None)
    verify = engine.forward(ids, here.repeat(1, 2), window, two, logits_at=at).float().log_softmax(-1)
    return torch.cat([draft[0], verify[0]])


def differences(model, context: int, length: int) -> dict[str, dict[str, float]]:
    """``{"plain" | "fast": {"mean", "largest"}}`` of ``model``, which is in bfloat16."""
    plain = Runtime(fast=False)
    wide = copy.deepcopy(model).float()
    want = log_probabilities(wide, plain, context, length)
    del wide
    ways = {"plain": plain} | ({"fast": Runtime()} if fast_forward_of(model) is not None else {})
    rows = {}
    for name, runtime in ways.items():
        away = (log_probabilities(model, runtime, context, length) - want).abs()
        finite = away.isfinite()
        rows[name] = {"mean": away[finite].mean().item(), "largest": away[finite].max().item()}
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(sdar.__file__).parent / "tiny"))
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape instead")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--block_length", type=int, default=16)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    if args.shape:
        model = random_model(args.shape, device, torch.bfloat16)
    else:
        model = SDARForCausalLM.from_pretrained(args.model, dtype="bfloat16", device=device)
    rows = differences(model, args.context, args.block_length)
    for name, row in rows.items():
        print(
            f"bfloat16 {name:6s} from float32: mean {row['mean']:.2e}, largest {row['largest']:.2e} (log-probability)"
        )
    if "fast" in rows:
        print(f"fast over plain: {rows['fast']['mean'] / rows['plain']['mean']:.3f} (tolerance {TOLERANCE})")
    print(json.dumps({"model": args.shape or args.model, "context": args.context, "differences": rows}))


if __name__ == "__main__":
    run_main(main)
