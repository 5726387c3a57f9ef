"""Train the tiny checkpoints.

    python -m train SDAR --seconds 100 --out DIR           train on a GPU, write a Hugging Face folder
    python -m train LLaDA2 --seconds 100 --out DIR         the same for LLaDA2
    python -m train SDAR --steps 3 --size smoke --out DIR  prove that it runs, on any machine
    python -m train Fast-dLLM-v2 --seconds 150 --out Fast-dLLM-v2/tiny --overwrite
    python -m train D2F --role model --backend llada --seconds 100 --out DIR
    python -m train D2F --role adapter --base DIR --seconds 100 --out DIR/adapter
    python -m train tokenizer --out DIR                    the shared tokenizer alone
    python -m train probe --model DIR --run_code           greedy scores on held-out problems

A checkpoint is written over only with --overwrite. The last line printed is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.errors import end_on_interrupt

    end_on_interrupt()

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import get_type_hints

from shared.errors import Parser, UserError, run_main
from shared.family import FAMILIES, Adapter, Family, Network, Training, family_named
from shared.network.loading import load_tokenizer, resolve_device
from shared.scripts import sandbox
from shared.scripts.cli import add_flag
from shared.scripts.files import check_writable
from shared.scripts.models import checkpoints_of, family_of_checkpoint, load_models

_WRITTEN = ("config.json", "model.safetensors", "tokenizer.json", "adapter_config.json", "adapter_model.safetensors")


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
        article = "an" if written.startswith("a") else "a"
        raise UserError(f"out {str(folder)!r} has {article} {written}. Allowed: a new folder, or --overwrite")


def check_no_adapter(folder: Path) -> None:
    """Raise `UserError` if an adapter lies in the folder of a network that is to be trained: it is of another."""
    for found in folder.glob("*/adapter_config.json"):
        raise UserError(
            f"out {str(folder)!r} holds an adapter, {found.parent.name}. Allowed: a new folder, or none there"
        )


def add_family(commands, name: str, family: Family) -> None:
    """The command that trains a family's networks."""
    roles = list(family.trains)
    about = " and ".join(dict.fromkeys(t.about for t in family.trains.values()))
    command = commands.add_parser(name, help=f"train a checkpoint by {about}", allow_abbrev=False)
    command.add_argument("--role", choices=roles, default=roles[0], help=f"which network (default: {roles[0]})")
    add_out(command)
    command.add_argument("--seconds", type=float, help="stop after this much training")
    command.add_argument("--steps", type=int, help="stop after this many steps")
    command.add_argument("--size", help=f"{', '.join(sizes_of(family))} (default: tiny, the shipped one)")
    command.add_argument("--start", help="go on from the weights of this checkpoint (default: from random ones)")
    command.add_argument("--batch_tokens", type=int, default=24_576, help="padded tokens a step")
    command.add_argument(
        "--workers", type=int, default=0, help="processes that generate problems (0: none beside this)"
    )
    command.add_argument("--compile", action="store_true", help="torch.compile the layers")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default="auto")
    if backends := backends_of(family):
        command.add_argument("--backend", type=str.lower, choices=list(backends), help="which kind of network")
    if any(isinstance(family.networks[role], Adapter) for role in roles):
        command.add_argument("--base", help="what an adapter is laid on: a checkpoint folder or hub id")
        command.add_argument("--dtype", help="that the base is loaded in (default: its own; float32 on a CPU)")
    for those in by_options(family).values():
        add_options(command.add_argument_group(f"--role {' or '.join(those)}"), family.trains[those[0]])


def sizes_of(family: Family) -> list[str]:
    """The sizes its networks come in."""
    from train.recipes import SIZES

    networks = [t for role, t in family.trains.items() if isinstance(family.networks[role], Network)]
    return list(dict.fromkeys(size for t in networks for size in t.sizes or SIZES))


def backends_of(family: Family) -> dict[str, str]:
    """The ``model_type`` of the networks that may stand in one place, by their names here; none where there is no choice."""
    networks = [n for role, n in family.networks.items() if role in family.trains and isinstance(n, Network)]
    return {t.lower(): t for n in networks if n.others for t in n.choices}


def by_options(family: Family) -> dict[str, list[str]]:
    """The roles whose objectives have options, by the class of those."""
    found: dict[str, list[str]] = {}
    for role, training in family.trains.items():
        if training.options:
            found.setdefault(training.options, []).append(role)
    return found


def add_options(section, training: Training) -> None:
    """A flag for every option of the objective; only those that are given appear in the result."""
    for group in training.options_class.groups().values():
        hints = get_type_hints(group)
        for option in dataclasses.fields(group):
            add_flag(section, section, option.name, hints[option.name], option, (option.name,))


def options_of(family: Family, args: argparse.Namespace) -> object:
    """The options of the role's objective, with the flags that were given; `UserError` for those of another role."""
    given = {}
    for those in by_options(family).values():
        names = family.trains[those[0]].options_class.names()
        found = {name: getattr(args, name) for name in names if hasattr(args, name)}
        if args.role in those:
            given |= found
        elif found:
            refuse(next(iter(found)), f"--role {' or '.join(those)}")
    kind = family.trains[args.role].options_class
    return kind and kind.from_flat(given)


def refuse(flag: str, allowed: str) -> None:
    """`UserError` for a flag that means nothing here."""
    raise UserError(f"{flag} means nothing here. Allowed: only with {allowed}")


def run_family(args: argparse.Namespace) -> dict:
    from train.recipes import Recipe, train, train_adapter

    family, device = FAMILIES[args.command], resolve_device(args.device)
    fields = ("seconds", "steps", "batch_tokens", "seed", "workers", "compile", "start")
    recipe = Recipe(**{name: getattr(args, name) for name in fields}, size=args.size or "tiny")
    options, about = options_of(family, args), {"family": args.command, "role": args.role, "out": str(args.out)}
    network = family.networks[args.role]
    if isinstance(network, Adapter):
        for flag in ("size", "backend", "start"):
            if getattr(args, flag, None):
                refuse(flag, f"--role {network.on}; an adapter has those of its base")
        if not args.base:
            raise UserError("give --base: the checkpoint folder or hub id the adapter is laid on")
        outcome = train_adapter(family, args.role, recipe, options, args.base, args.dtype or "auto", args.out, device)
        return {**about, "base": args.base, "seed": args.seed, **outcome.as_dict()}
    for flag in ("base", "dtype"):
        if getattr(args, flag, None):
            refuse(flag, "the role of an adapter")
    if args.start and args.size:
        refuse("size", "no --start, which has a size already")
    check_no_adapter(args.out)
    training = family.trains[args.role]
    if getattr(args, "backend", None):
        network = network.choices[backends_of(family)[args.backend]]
        about["backend"] = args.backend
    outcome = train(training.of_type(network.model_type), network, recipe, options, args.out, device)
    return {
        **about,
        "start": args.start,
        "size": None if args.start else recipe.size,
        "seed": args.seed,
        **outcome.as_dict(),
    }


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
