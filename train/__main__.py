"""Train the tiny checkpoints.

    python -m train SDAR --seconds 100 --out DIR           train on a GPU, write a Hugging Face folder
    python -m train LLaDA2 --seconds 100 --out DIR         the same for LLaDA2
    python -m train SDAR --steps 3 --size smoke --out DIR  prove that it runs, on any machine
    python -m train Fast-dLLM-v2 --seconds 150 --out Fast-dLLM-v2/tiny --overwrite
    python -m train tokenizer --out DIR                    the shared tokenizer alone
    python -m train probe --model DIR --run_code           greedy scores on held-out problems

A checkpoint is written over only with --overwrite. The last line printed is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.errors import end_on_interrupt

    end_on_interrupt()

import argparse
import json
import sys
from pathlib import Path

from shared.errors import Parser, UserError, run_main
from shared.family import FAMILIES, Family, family_named
from shared.network.loading import load_tokenizer, resolve_device
from shared.scripts import sandbox
from shared.scripts.files import check_writable
from shared.scripts.models import checkpoints_of, family_of_checkpoint, load_models

_WRITTEN = ("config.json", "model.safetensors", "tokenizer.json")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    trained = {name: family for name, family in FAMILIES.items() if family.trains}
    commands = parser.add_subparsers(
        dest="command", required=True, metavar=f"{{{','.join([*trained, 'tokenizer', 'probe'])}}}"
    )
    for name, family in trained.items():
        add_family(commands, name, family)
    tokenizer = commands.add_parser("tokenizer", help="build the shared tokenizer", allow_abbrev=False)
    add_out(tokenizer)
    probe = commands.add_parser("probe", help="scores of a checkpoint on held-out problems", allow_abbrev=False)
    probe.add_argument("--model", required=True, help="checkpoint of the family's first network, or one that ships")
    probe.add_argument("--family", help="default: that of the checkpoint")
    probe.add_argument(
        "--checkpoint", action="append", default=[], metavar="ROLE=PATH", help="of another network; repeatable"
    )
    probe.add_argument("--count", type=int, default=256, help="problems per task")
    probe.add_argument("--run_code", action="store_true", help="judge functions too: runs model-written code, confined")
    probe.add_argument("--seed", type=int, default=0)
    probe.add_argument("--device", default="auto")
    return parser.parse_args(arguments)


def add_out(command: argparse.ArgumentParser) -> None:
    """Where to write, and whether over what is there."""
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.add_argument("--overwrite", action="store_true", help="write over a checkpoint that is there")


def check_out(folder: Path, overwrite: bool) -> None:
    """Raise `UserError` unless a checkpoint may be written there: before anything is trained."""
    check_writable(folder)
    written = next((name for name in _WRITTEN if (folder / name).exists()), None)
    if written and not overwrite:
        raise UserError(f"out {str(folder)!r} has a {written}. Allowed: a new folder, or --overwrite")


def add_family(commands, name: str, family: Family) -> None:
    """The command that trains a family's networks."""
    roles = list(family.trains)
    about = " and ".join(dict.fromkeys(t.about for t in family.trains.values()))
    command = commands.add_parser(name, help=f"train a checkpoint by {about}", allow_abbrev=False)
    command.add_argument("--role", choices=roles, default=roles[0], help=f"which network (default: {roles[0]})")
    add_out(command)
    command.add_argument("--seconds", type=float, help="stop after this much training")
    command.add_argument("--steps", type=int, help="stop after this many steps")
    command.add_argument("--size", default="tiny", help="smoke, small, tiny (the shipped one) or medium")
    command.add_argument("--batch_tokens", type=int, default=24_576, help="padded tokens a step")
    command.add_argument(
        "--workers", type=int, default=0, help="processes that generate problems (0: none beside this)"
    )
    command.add_argument("--compile", action="store_true", help="torch.compile the layers")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default="auto")


def run_family(args: argparse.Namespace) -> dict:
    from train.recipes import Recipe, train

    fields = ("seconds", "steps", "size", "batch_tokens", "seed", "workers", "compile")
    recipe = Recipe(**{name: getattr(args, name) for name in fields})
    outcome = train(FAMILIES[args.command], args.role, recipe, args.out, resolve_device(args.device))
    about = {"family": args.command, "role": args.role, "out": str(args.out), "size": args.size, "seed": args.seed}
    return {**about, **outcome.as_dict()}


def run_tokenizer(args: argparse.Namespace) -> dict:
    from train.tokenizer import build_tokenizer, save_tokenizer

    tokenizer = build_tokenizer()
    save_tokenizer(tokenizer, args.out)
    return {"out": str(args.out), "vocab_size": len(tokenizer)}


def run_probe(args: argparse.Namespace) -> dict:
    from train.probe import probe, table

    family = family_named(args.family or family_of_checkpoint(args.model))
    given = dict(pair.partition("=")[::2] for pair in args.checkpoint)
    checkpoints = checkpoints_of(family, args.model, given)
    models = load_models(family, checkpoints, dtype="float32", device=resolve_device(args.device))
    tokenizer = load_tokenizer(checkpoints[family.first])
    rows = probe(family, models, tokenizer, count=args.count, seed=args.seed, run_code=args.run_code)
    print(table(rows))
    if said := sandbox.told(sandbox.DEATHS):
        print(said)
    return {"model": args.model, "family": family.name, "count": args.count, "seed": args.seed, "rows": rows}


def run(arguments: list[str] | None) -> None:
    args = parse(arguments)
    if args.command != "probe":
        check_out(args.out, args.overwrite)
    elif args.count < 1:
        raise UserError(f"count is {args.count}. Allowed: a whole number, at least 1")
    result = {"tokenizer": run_tokenizer, "probe": run_probe}.get(args.command, run_family)(args)
    print(json.dumps(result), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit code."""
    try:
        run_main(lambda: run(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
