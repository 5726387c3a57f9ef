"""Train the tiny checkpoints.

    python -m train SDAR --seconds 100 --out SDAR/tiny     train on a GPU, write a Hugging Face folder
    python -m train LLaDA2 --seconds 100 --out DIR         the same for LLaDA2
    python -m train SDAR --steps 3 --size smoke --out DIR  prove that it runs, on any machine
    python -m train Fast-dLLM-v2 --seconds 150 --out Fast-dLLM-v2/tiny
    python -m train tokenizer --out DIR                    the shared tokenizer alone
    python -m train probe --model DIR --run_code           greedy scores on held-out problems

The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from shared.errors import UserError
from shared.network.loading import CheckpointModel, checkpoint_folder, load_tokenizer, resolve_device


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str):
        raise UserError(message)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{SDAR,LLaDA2,Fast-dLLM-v2,tokenizer,probe}"
    )
    for name, objective in (
        ("SDAR", "block diffusion"),
        ("LLaDA2", "block diffusion with token editing"),
        ("Fast-dLLM-v2", "shifted block diffusion"),
    ):
        family = commands.add_parser(name, help=f"train a checkpoint by {objective}", allow_abbrev=False)
        family.add_argument("--out", type=Path, required=True, help="folder to write")
        family.add_argument("--seconds", type=float, help="stop after this much training")
        family.add_argument("--steps", type=int, help="stop after this many steps")
        family.add_argument("--size", default="tiny", help="smoke, small, tiny (the shipped one) or medium")
        family.add_argument("--batch_tokens", type=int, default=24_576, help="padded tokens a step")
        family.add_argument(
            "--workers", type=int, default=0, help="processes that generate problems (0: none beside this)"
        )
        family.add_argument("--compile", action="store_true", help="torch.compile the layers")
        family.add_argument("--seed", type=int, default=0)
        family.add_argument("--device", default="auto")
    tokenizer = commands.add_parser("tokenizer", help="build the shared tokenizer", allow_abbrev=False)
    tokenizer.add_argument("--out", type=Path, required=True, help="folder to write")
    probe = commands.add_parser("probe", help="scores of a checkpoint on held-out problems", allow_abbrev=False)
    probe.add_argument("--model", required=True, help="checkpoint folder")
    probe.add_argument("--count", type=int, default=256, help="problems per task")
    probe.add_argument(
        "--run_code", action="store_true", help="judge functions too: runs model-written code, unconfined"
    )
    probe.add_argument("--seed", type=int, default=0)
    probe.add_argument("--device", default="auto")
    return parser.parse_args(arguments)


def run_family(args: argparse.Namespace) -> dict:
    from train.recipes import FAMILIES, Recipe

    fields = ("seconds", "steps", "size", "batch_tokens", "seed", "workers", "compile")
    recipe = Recipe(**{name: getattr(args, name) for name in fields})
    outcome = FAMILIES[args.command](recipe, args.out, resolve_device(args.device))
    return {"family": args.command, "out": str(args.out), "size": args.size, "seed": args.seed, **outcome.as_dict()}


def run_tokenizer(args: argparse.Namespace) -> dict:
    from train.tokenizer import build_tokenizer, save_tokenizer

    tokenizer = build_tokenizer()
    save_tokenizer(tokenizer, args.out)
    return {"out": str(args.out), "vocab_size": len(tokenizer)}


def load_model(path: str, device: torch.device) -> CheckpointModel:
    """The checkpoint in float32, in the class of its own family."""
    from llada2 import LLaDA2MoeModelLM
    from sdar import SDARForCausalLM

    found = json.loads((checkpoint_folder(path) / "config.json").read_text()).get("model_type")
    kinds = {kind.config_class.model_type: kind for kind in (SDARForCausalLM, LLaDA2MoeModelLM)}
    if found not in kinds:
        raise UserError(
            f"model {path!r} is of type {found!r}, which the probe cannot decode. Allowed: {', '.join(kinds)}; "
            "python -m eval.compare decodes every family"
        )
    return kinds[found].from_pretrained(path, dtype="float32", device=device)


def run_probe(args: argparse.Namespace) -> dict:
    from train.probe import DECODERS, EDITING_DECODERS, probe, table

    model = load_model(args.model, resolve_device(args.device))
    decoders = DECODERS + (EDITING_DECODERS if model.config.model_type == "llada2_moe" else ())
    tokenizer = load_tokenizer(args.model)
    rows = probe(model, tokenizer, count=args.count, seed=args.seed, run_code=args.run_code, decoders=decoders)
    print(table(rows))
    return {"model": args.model, "count": args.count, "seed": args.seed, "rows": rows}


def main(arguments: list[str] | None = None) -> int:
    try:
        args = parse(arguments)
        result = {"tokenizer": run_tokenizer, "probe": run_probe}.get(args.command, run_family)(args)
    except UserError as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
