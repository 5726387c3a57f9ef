"""How far the forwards of a model in bfloat16 are from its plain forward in float32, in log-probabilities.

python -m eval.precision --shape sdar-8b       # random weights of a named shape, on a GPU
python -m eval.precision                       # the default family's shipped checkpoint, on what is here

One prompt is encoded, then the forwards of the family's decoders (drafts, verifies) run on top of it: by the plain
network in float32 (the weights are those of bfloat16, so only arithmetic differs), by the plain network in bfloat16,
and by the fast forward in bfloat16 where it can run. The fast forward is compared with the plain network at its own
precision. Prints mean and largest difference of log-probabilities; one JSON line last.
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.errors import end_on_interrupt

    end_on_interrupt()

import argparse
import copy
import json

import torch
from torch import Tensor

from eval.benchmark import prompts_of, vocabulary
from eval.shapes import family_of, random_models, shapes
from shared.errors import Parser, run_main
from shared.family import FAMILIES, Timed, imported
from shared.gpu.engine import Engine
from shared.gpu.fast import fast_forward_of
from shared.network import masks
from shared.network.loading import resolve_device
from shared.options import Runtime
from shared.scripts.models import checkpoints_of, load_models

TOLERANCE = 1.25  # the fast forward's mean difference over that of the plain network in bfloat16


@torch.inference_mode()
def log_probabilities(model, timed: Timed, runtime: Runtime, context: int, length: int) -> Tensor:
    """``[N, V]`` float32: where the family's timed forwards give logits, after ``context`` tokens, half a block
    masked."""
    device, mask_id = model.device, model.special_ids()[0]
    kinds = [f for f in imported(timed.forwards)(length, device) if not f.commit_rows]
    engine = Engine(model, 1, context + 3 * length, imported(timed.kinds)(length), runtime)
    prompt = torch.tensor(prompts_of(model, 1, context), device=device)
    positions = torch.arange(context, device=device)[None]
    mask = masks.block_causal(context, length, device)
    engine.forward(prompt, positions, engine.cache.window(context, [0]), mask, logits_at=slice(0, 0))
    engine.cache.commit([context], [0])
    found = []
    for kind in kinds:
        ids = torch.randint(vocabulary(model), (1, kind.tokens), generator=torch.Generator().manual_seed(1)).to(device)
        ids = torch.where(torch.arange(kind.tokens, device=device) < length // 2, ids, mask_id)
        window = engine.cache.window(kind.tokens, [0], offset=kind.offset, width=kind.width)
        at = None if kind.picks is None else torch.tensor([list(kind.picks)], device=device)
        local = None if kind.mask is None else kind.mask[None]
        here = window.prefix[:, None] + kind.offset + kind.place(device)
        found.append(engine.forward(ids, here, window, local, logits_at=at).float().log_softmax(-1)[0])
    return torch.cat(found)


def differences(model, timed: Timed, context: int, length: int) -> dict[str, dict[str, float]]:
    """``{"plain" | "fast": {"mean", "largest"}}`` of ``model``, which is in bfloat16."""
    plain = Runtime(fast=False)
    wide = copy.deepcopy(model).float()
    want = log_probabilities(wide, timed, plain, context, length)
    del wide
    ways = {"plain": plain} | ({"fast": Runtime()} if fast_forward_of(model) is not None else {})
    rows = {}
    for name, runtime in ways.items():
        away = (log_probabilities(model, timed, runtime, context, length) - want).abs()
        finite = away.isfinite()
        rows[name] = {"mean": away[finite].mean().item(), "largest": away[finite].max().item()}
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, help="default: that of the shape or model, else the default one")
    parser.add_argument("--model", help="a checkpoint (default: the family's shipped one, unless --shape is given)")
    parser.add_argument("--shape", choices=sorted(shapes()), help="random weights of this shape instead")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--block_length", type=int, default=16)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    device, family = resolve_device(args.device), family_of(args.family, args.shape, args.model)
    source = args.model or f"{family.name}/{next(iter(family.shipped))}"
    if args.shape:
        models = random_models(family, args.shape, device, torch.bfloat16)
    else:
        models = load_models(family, checkpoints_of(family, source), dtype="bfloat16", device=device)
    rows = differences(
        models[family.first], family.timed[family.first].of(models[family.first]), args.context, args.block_length
    )
    for name, row in rows.items():
        print(
            f"bfloat16 {name:6s} from float32: mean {row['mean']:.2e}, largest {row['largest']:.2e} (log-probability)"
        )
    if "fast" in rows:
        print(f"fast over plain: {rows['fast']['mean'] / rows['plain']['mean']:.3f} (tolerance {TOLERANCE})")
    print(json.dumps({"model": args.shape or source, "context": args.context, "differences": rows}))


if __name__ == "__main__":
    run_main(main)
