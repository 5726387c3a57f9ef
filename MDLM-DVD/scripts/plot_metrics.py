"""Plots and tables of what run_evals.py wrote: accuracy against forwards, steps and latency, one line an algorithm.

python scripts/plot_metrics.py --results_dir eval_results --output_dir eval_results/plots

Error bars are one standard error, from the number of problems. What a file does not say is left out.
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.errors import end_on_interrupt

    end_on_interrupt()

import argparse
import json
from collections.abc import Iterator, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from eval.plots import THEMES, Styles, frontier, style
from mdlm_dvd.src.evals.suite.report import as_csv, as_markdown
from shared.errors import Parser, UserError, run_main
from shared.scripts.files import check_writable, write_whole

Row = dict[str, Any]
PLOTS = {
    "pareto_nfe_vs_acc.png": ("weighted_nfe", "forwards a text, in those of the verifier"),
    "pareto_steps_vs_acc.png": ("steps", "steps"),
    "pareto_latency_vs_acc.png": ("latency", "seconds a text"),
}
_COLUMNS = ("task", "algorithm", "drafter", "verifier", "steps", "gen_length", "accuracy", "stderr", "problems", "drafter_nfe",
            "verifier_nfe", "drafter_cost", "weighted_nfe", "acceptance_rate", "latency", "file")  # fmt: skip


def rows_of(name: str, found: Row) -> Iterator[Row]:
    """A row for each task of a result file. ``weighted_nfe``: a forward of the drafter counts for ``drafter_cost`` of the verifier's, 1 where the file does
    not say."""
    config, average = found["config"], found.get("dvd_metrics_average") or {}
    costs = {k: average.get(k) for k in ("drafter_nfe", "verifier_nfe", "acceptance_rate")}
    weighted = None
    if costs["verifier_nfe"] is not None:
        weighted = costs["verifier_nfe"] + (costs["drafter_nfe"] or 0) * average.get("drafter_cost", 1.0)
    for task, score in found["task_scores"].items():
        if score is None:
            continue
        count = (found.get("task_samples") or {}).get(task)
        yield {
            "task": task,
            **{k: config.get(k) for k in ("algorithm", "drafter", "verifier", "steps", "gen_length")},
            "accuracy": score,
            "stderr": sqrt(score * (1 - score) / count) if count else None,
            "problems": count,
            **costs,
            "drafter_cost": average.get("drafter_cost"),
            "weighted_nfe": weighted,
            "latency": average.get("seconds_per_text", average.get("total_latency")),
            "file": name,
        }


def read(folder: Path) -> tuple[list[Row], list[str]]:
    """The rows of all result files of a folder, and the names of files that are none."""
    if not folder.is_dir():
        raise UserError(f"results_dir {str(folder)!r} is no folder. Allowed: where run_evals.py wrote")
    rows, others = [], []
    for path in sorted(folder.glob("*.json")):
        found = _rows_in(path)
        rows += found or []
        if found is None:
            others.append(path.name)
    if not rows:
        raise UserError(f"results_dir {str(folder)!r} holds no results with a score. Allowed: where run_evals.py wrote")
    return sorted(rows, key=lambda r: (r["task"], str(r["algorithm"]), r["steps"] or 0)), others


def _rows_in(path: Path) -> list[Row] | None:
    """None: it is no result file."""
    try:
        return list(rows_of(path.name, json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def points(rows: Sequence[Row]) -> list[Row]:
    """Rows as `eval.plots` draws them. A line is an algorithm, with its models where the files have several."""
    several = len({(r["drafter"], r["verifier"]) for r in rows}) > 1
    return [
        {
            **r,
            "group": f"{r['algorithm']}, {r['drafter']} for {r['verifier']}" if several else str(r["algorithm"]),
            "setting": str(r["steps"]),
            "low": r["accuracy"] - (r["stderr"] or 0),
            "high": r["accuracy"] + (r["stderr"] or 0),
        }
        for r in rows
    ]


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Every plot that there is data for."""
    drawn, all_points = [], points(rows)
    styles = Styles(all_points, baseline="")
    with pyplot.rc_context(style(THEMES["light"])):
        for name, (cost, label) in PLOTS.items():
            figure = frontier(all_points, styles, cost, label)
            if figure is not None:
                for ax in figure.axes:  # these spread over less than a power of ten
                    ax.set_xscale("linear")
                    ax.set_xlim(left=0)
                figure.savefig(folder / name, dpi=110, bbox_inches="tight")
                pyplot.close(figure)
                drawn.append(folder / name)
    return drawn


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    made.add_argument("--results_dir", default="eval_results", help="where run_evals.py wrote")
    made.add_argument("--output_dir", help="default: plots in results_dir")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    asked = parser().parse_args(argv)
    source = Path(asked.results_dir)
    folder = Path(asked.output_dir or source / "plots")
    rows, others = read(source)
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = [{name: row[name] for name in _COLUMNS} for row in rows]
    write_whole(folder / "table.csv", as_csv(table))
    write_whole(folder / "table.md", as_markdown(table))
    for name in others:
        print(f"left out: {name} is no result of run_evals.py")
    for path in (*draw(rows, folder), folder / "table.csv", folder / "table.md"):
        print(path)


if __name__ == "__main__":
    run_main(main)
