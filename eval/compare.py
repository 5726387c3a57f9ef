"""Compares decoders and families on the same problems and writes a report of cost and accuracy.

python -m eval.compare eval/grids/tiny.yaml --confirm_run_unsafe_code    # thresholds against S2D2
python -m eval.compare --run decoder=standard,block_length=8/16 --run preset=tiny --tasks instructions

A cell is a setting on a task. Finished cells are appended to ``cells.jsonl`` in the output folder and finished texts
under ``predictions``, so that the same command goes on where a killed one stopped. The machine's read bandwidth and
matrix rate are measured once (``machine.json``): they give the least time that a decoder's forwards can take. Then:
results.json, results.csv, plots, and report.html, one file with everything in it.
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.errors import end_on_interrupt

    end_on_interrupt()

import argparse
import dataclasses
import json
import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from eval.grid import Grid, grid_of, read_grid, run_of_flag
from eval.results import rows_of, write_csv
from eval.roofline import Machine
from shared.errors import Parser, UserError, run_main
from shared.family import family_named
from shared.network.loading import load_tokenizer, read_json
from shared.scripts.claims import claimed
from shared.scripts.distributed import World
from shared.scripts.files import check_writable, write_whole
from shared.scripts.models import check_models
from shared.scripts.sandbox import told
from shared.scripts.store import Store, records_in

if TYPE_CHECKING:
    from eval.cells import Tasks

MACHINE = "machine.json"


def parser() -> argparse.ArgumentParser:
    flags = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flags.add_argument("grid", nargs="?", help="a YAML file: see eval/grids, and eval/grid.py for its keys")
    flags.add_argument(
        "--run",
        action="append",
        default=[],
        help="instead of a file: family=...,decoder=...,OPTION=VALUE/VALUE; repeatable",
    )
    flags.add_argument("--tasks", help="tasks of lm-eval, separated by commas; default: the grid's")
    flags.add_argument("--problems", type=int, help="the first so many of each task; default: the grid's")
    flags.add_argument(
        "--baseline", help="the setting that the others are compared with; default: the grid's, or the first"
    )
    flags.add_argument("--only", help="of the grid only settings that this regular expression finds, and the baseline")
    flags.add_argument("--output", help="folder of the results, one a machine; default: results/NAME")
    flags.add_argument("--batch_size", type=int, help="texts in flight; default: the grid's")
    flags.add_argument("--dtype", help="auto, float32, bfloat16, ...; default: the grid's")
    flags.add_argument("--device", default="auto")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument(
        "--confirm_run_unsafe_code",
        action="store_true",
        help="run model-written code, confined (shared/scripts/sandbox.py)",
    )
    flags.add_argument(
        "--report", action="store_true", help="measure nothing: write the report of the cells that are there"
    )
    return flags


def grid_from(args: argparse.Namespace) -> Grid:
    """The grid of a file or of ``--run``, changed by the other flags."""
    if bool(args.grid) == bool(args.run):
        raise UserError("a grid file and --run are both given or both missing. Allowed: one of them")
    tasks = args.tasks.split(",") if args.tasks else None
    if args.run:
        grid = grid_of({"name": "comparison", "tasks": tasks, "runs": [run_of_flag(r) for r in args.run]})
    else:
        grid = read_grid(args.grid)
        kept = [a for t in tasks or () for a in [next((a for a in grid.tasks if a.task == t), None)] if a]
        if tasks and len(kept) < len(tasks):
            raise UserError(f"tasks is {args.tasks!r}. Allowed with this grid: {', '.join(a.task for a in grid.tasks)}")
        grid = dataclasses.replace(grid, tasks=tuple(kept) or grid.tasks)
    given = {k: v for k in ("problems", "batch_size", "dtype", "baseline") if (v := getattr(args, k)) is not None}
    grid = dataclasses.replace(grid, **given)
    for name in ("problems", "batch_size"):
        if (value := getattr(grid, name)) is not None and value < 1:
            raise UserError(f"{name} is {value}. Allowed: at least 1")
    if not any(s.name == grid.baseline for s in grid.settings):
        if args.baseline:
            raise UserError(f"baseline is {args.baseline!r}. Allowed: {', '.join(s.name for s in grid.settings)}")
        grid = dataclasses.replace(grid, baseline=grid.settings[0].name)
    return grid.only(args.only) if args.only else grid


def check(grid: Grid, tasks: Tasks, *, device: str, run_code: bool) -> None:
    """Raise `UserError` for whatever would stop the comparison later: tasks, metrics, checkpoints, options."""
    from eval.model import DTYPES, prompt_room, without_neutral

    for asked in dict.fromkeys(a for s in grid.settings for a in grid.asked(s)):
        tasks.check(asked, run_code)
    known: dict[str, tuple] = {}
    for setting in grid.settings:
        family = family_named(setting.family)
        if (name := str(setting.checkpoints)) not in known:
            source, dtype = setting.checkpoints[family.first], DTYPES.get(grid.dtype, grid.dtype)
            model = check_models(family, setting.checkpoints, dtype=dtype, device=device)[family.first]
            known[name] = model, load_tokenizer(source)
            if any(a.chat for a in grid.asked(setting)) and not known[name][1].chat_template:
                raise UserError(f"{source} has no chat template. Allowed: one with it, or chat: false in the grid")
        model, tokenizer = known[name]
        for generation in filter(None, map(tasks.generation, grid.asked(setting))):
            flat = setting.resolved(without_neutral(generation))
            prompt_room(flat, model.config)
            model.special_ids(flat.get("mask_id"), flat.get("stopping_criteria_idx"), tokenizer)


def measure(grid: Grid, folder: Path, tasks: Tasks, *, device: str, seed: int, run_code: bool) -> None:
    """Measure what is missing in ``folder``, baselines first, one checkpoint after the other."""
    from eval.cells import Bench, cell_key

    cells = Store(folder, "cells", "key")  # the process that leads writes it
    leads = World.from_environment().rank == 0
    ordered = sorted(grid.settings, key=lambda s: s.name != grid.baseline)
    todo = [(s, a) for s in ordered for a in grid.asked(s) if cell_key(grid, s, a, seed) not in cells.found]
    number = 0
    for family, checkpoint in dict.fromkeys((s.family, s.checkpoint) for s, _ in todo):
        here = [(s, a) for s, a in todo if (s.family, s.checkpoint) == (family, checkpoint)]
        bench = Bench(grid, here[0][0], folder, tasks, device=device, seed=seed, run_code=run_code)
        if leads and machine_in(folder) is None:
            write_whole(folder / MACHINE, json.dumps(bench.machine().to_json()) + "\n")
        for setting, asked in here:
            number += 1
            cell = bench.measure(setting, asked)
            if leads and cell is not None:
                cells.append(cell)
                print(f"{number}/{len(todo)} {line_of(cell)}", flush=True)
    cells.close()


def machine_in(folder: Path) -> Machine | None:
    """The machine of a comparison, as its first run measured it; floors of all its cells are floors on it."""
    path = folder / MACHINE
    if not path.is_file():
        return None
    try:
        return Machine.from_json(read_json(path))
    except (TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}). Allowed: another folder, or without this file") from error


def line_of(cell: dict) -> str:
    """A cell in one line, printed as it finishes."""
    count, tokens, died = len(cell["docs"]), max(1, sum(cell["tokens"])), Counter(cell.get("died")).elements()
    return (
        f"{cell['family']} {cell['task']} {cell['setting']}: {100 * sum(cell['values']) / count:.1f} % of {count}, "
        f"{sum(cell['forwards'].values()) / tokens:.3f} forwards/token, {cell['seconds']:.1f} s"
        + "".join(f"; {said}" for said in [told(died)] if said)
    )


def cells_in(folder: Path) -> list[dict]:
    """The finished cells of a folder, the last of a key where there are two."""
    return list(records_in(folder, "cells", "key").values())


def write(grid: Grid, folder: Path, seed: int) -> None:
    """Every file of the report, from the finished cells of this grid."""
    from eval import page, plots
    from eval.cells import cell_key, described

    asked = [(s, a) for t in grid.tasks for s in grid.settings for a in grid.asked(s) if a.task == t.task]
    keys = {cell_key(grid, s, a, seed): (s, a) for s, a in asked}
    measured = {c["key"]: c for c in cells_in(folder)}
    # Another grid may have measured a cell here, under another name or by a preset.
    cells = [measured[k] | described(s, a) for k, (s, a) in keys.items() if k in measured]
    if not cells:
        raise UserError(
            f"output {str(folder)!r} holds no cell of this grid. Allowed: a folder in which one was measured"
        )
    machine = machine_in(folder)
    rows = rows_of(cells, grid.baseline, machine)
    about = {"name": grid.name, "about": grid.about, "baseline": grid.baseline, "problems": grid.problems, "seed": seed,
             "finished": f"{len(cells)} of {len(keys)} cells"}  # fmt: skip
    results = {"grid": about, "machine": machine.to_json() if machine else None, "rows": rows}
    write_whole(folder / "results.json", in_lines(results))
    write_csv(folder / "results.csv", rows)
    pictures = plots.draw(results, cells, folder)
    write_whole(folder / "report.html", page.render(results, cells, pictures))
    print(f"{folder}/report.html, results.json, results.csv, {', '.join(p.name for p in pictures.values())}")


def in_lines(results: dict) -> str:
    """JSON with one row a line, so that a change is a change of lines."""
    rows = ",\n".join(json.dumps(r) for r in results["rows"])
    head = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in results.items() if k != "rows")
    return f'{{{head},\n"rows": [\n{rows}\n]}}\n'


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    grid = grid_from(args)
    folder = Path(args.output or Path("results") / grid.name.replace(" ", "-"))
    check_writable(folder)
    world = World.from_environment()
    if not args.report:
        from eval.cells import Tasks

        tasks, asked = Tasks(grid), {"device": args.device, "run_code": args.confirm_run_unsafe_code}
        world.decided(lambda: check(grid, tasks, **asked))
    with claimed(folder if world.rank == 0 else None, several=world.size > 1):
        if not args.report:
            measure(grid, folder, tasks, device=args.device, seed=args.seed, run_code=args.confirm_run_unsafe_code)
        if world.rank == 0:
            write(grid, folder, args.seed)


if __name__ == "__main__":
    run_main(main)
