"""What a finished run leaves: its results as JSON, tables as CSV and Markdown, plots, and what made it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from mdlm_dvd.src.evals.suite.metrics import confidence_interval
from shared.scripts.files import write_whole

Row = dict[str, Any]
_COSTS = (
    "drafter_nfe",
    "verifier_nfe",
    "flops_estimate",
    "acceptance_rate",
    "tokens",
    "seconds",
    "tokens_per_second",
    "peak_memory",
)


def write(results: Row, folder: Path) -> None:
    """Every file of a run; each is written whole."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = over_seeds(results["all_runs"], results["config"]["metrics"]["accuracy"]["confidence"])
    write_whole(folder / "full_evaluation_results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_whole(folder / "main_results.csv", as_csv(main_table(rows)))
    write_whole(folder / "hyperparameters.csv", as_csv([settings_row(r) for r in rows]))
    write_whole(folder / "README.md", page(results, rows))
    write_whole(folder / "reproducibility.md", reproducibility(results))
    draw(rows, folder)


def over_seeds(runs: Sequence[Row], confidence: float) -> list[Row]:
    """One row for a method, setting and task. Accuracy: of each problem the mean of its seeds, then the mean of the problems with Student's interval."""
    key = lambda run: (run["method"], run["setting"], run["task"])  # noqa: E731
    order = list(dict.fromkeys(map(key, runs)))
    found = []
    for group, members in groupby(sorted(runs, key=lambda run: order.index(key(run))), key=key):
        same = list(members)
        solved = [mean(map(int, digits)) for digits in zip(*(run["solved"] for run in same), strict=True)]
        share, margin = confidence_interval(solved, confidence)
        row = dict(zip(("method", "setting", "task"), group, strict=True)) | {
            "params": same[0]["params"],
            "seeds": len(same),
        }
        row |= {"problems": same[0]["problems"], "accuracy": share, "margin": margin}
        row |= {name: _mean([run[name] for run in same]) for name in _COSTS}
        if "diversity" in same[0]:
            row |= {name: _mean([run["diversity"][name] for run in same]) for name in same[0]["diversity"]}
        if "generative_perplexity" in same[0]:
            row["generative_perplexity"] = _mean([run["generative_perplexity"]["perplexity"] for run in same])
            row["perplexity_mean_tokens"] = _mean([run["generative_perplexity"]["mean_tokens"] for run in same])
        found.append(row)
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return mean(known) if known else None


def main_table(rows: Sequence[Row]) -> list[Row]:
    """Methods by tasks: accuracy in percent with its margin."""
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    table = []
    for name in dict.fromkeys((r["method"], r["setting"]) for r in rows):
        here = {r["task"]: r for r in rows if (r["method"], r["setting"]) == name}
        table.append(
            {"method": name[0], "setting": name[1]} | {t: _with_margin(here[t]) if t in here else "" for t in tasks}
        )
    return table


def _with_margin(row: Row) -> str:
    return f"{100 * row['accuracy']:.1f} ± {100 * row['margin']:.1f}"


def settings_row(row: Row) -> Row:
    """A row of hyperparameters.csv: a column for each parameter and each figure."""
    return {
        "method": row["method"],
        **row["params"],
        **{k: v for k, v in row.items() if k not in ("method", "params", "setting")},
    }


def as_csv(rows: Sequence[Row]) -> str:
    """Rows with the columns of all of them."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_markdown(rows: Sequence[Row]) -> str:
    """The same as a table of a Markdown page."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(_shown(row.get(c)) for c in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def page(results: Row, rows: Sequence[Row]) -> str:
    """The summary, README.md."""
    config = results["config"]
    seeds, share = config["seeds"], config["metrics"]["accuracy"]["confidence"]
    parts = [
        f"# {config['experiment_name']}\n",
        f"Drafter `{config['drafter']}`, verifier `{config['verifier']}`, algorithm `{config['algorithm']}`, seeds {', '.join(map(str, seeds))}. "
        f"Problems: {', '.join(f'{t} {n}' for t, n in dict.fromkeys((r['task'], r['problems']) for r in rows))}.\n",
        f"## Accuracy\n\nPercent of problems solved, ± Student's interval at {share:.0%} over problems; a problem counts with the mean of its seeds. "
        "An interval of all or none is 0 wide, which says little of few problems.\n",
        as_markdown(main_table(rows)),
        "![Accuracy against operations](pareto.png)\n",
        "![Accuracy by method](accuracy.png)\n",
        "## Cost\n\nForwards of each model a text (nfe), and seconds of all texts of a seed. A forward of the drafter and one of the verifier cost "
        "different amounts: the FLOPs estimate, 2 · parameters · nfe for each position, weighs them by parameters.\n",
        as_markdown([_short(r, ("method", "setting", "task"), _COSTS) for r in rows]),
    ]
    told = [k for k in rows[0] if k.startswith(("distinct_", "entropy", "self_bleu"))]
    if told:
        parts += ["## Diversity\n", as_markdown([_short(r, ("method", "setting", "task"), told) for r in rows])]
    if "generative_perplexity" in rows[0]:
        judge = config["metrics"]["generative_perplexity"]["model"]
        figures = ("generative_perplexity", "perplexity_mean_tokens")
        parts += [
            f"## Perplexity of the outputs under `{judge}`\n",
            as_markdown([_short(r, ("method", "setting", "task"), figures) for r in rows]),
        ]
    if results["held_out_bound"]:
        parts += [
            "## Negative log-likelihood of the solutions: an upper bound\n",
            as_markdown(results["held_out_bound"]),
        ]
    if results["speed"]:
        parts += ["## Speed\n\nOnly decoding is timed, after one batch to warm up.\n", as_markdown(results["speed"])]
    if results["robustness"]:
        figures = ("seed", "groups", "mean_similarity", "variance")
        parts += [
            "## Robustness\n\nJaccard similarity of the outputs of a prompt's variants to that of the first. What adversarial prompts gave is in "
            "full_evaluation_results.json.\n",
            as_markdown([_short(r, ("method", "setting"), figures) for r in results["robustness"]]),
        ]
    return "\n".join(parts)


def _short(row: Row, names: Sequence[str], figures: Sequence[str]) -> Row:
    return {k: row[k] for k in (*names, *figures)}


def reproducibility(results: Row) -> str:
    """What made the results."""
    made = results["reproducibility"]
    lines = [f"- {key}: {value}" for key, value in made.items() if key != "command"]
    return (
        f"# {results['experiment_name']}: how it was made\n\n```bash\n{made['command']}\n```\n\n"
        + "\n".join(lines)
        + f"\n\n```json\n{json.dumps(results['config'], indent=1)}\n```\n"
    )


def draw(rows: Sequence[Row], folder: Path) -> None:
    """``pareto.png``: accuracy against operations, one panel a task; ``accuracy.png``: bars."""
    from matplotlib import pyplot

    from eval.plots import HUES, THEMES, Styles, frontier, panels, style

    points = [
        {
            "task": r["task"],
            "group": r["method"],
            "setting": r["setting"],
            "operations": r["flops_estimate"] / 1e9,
            "accuracy": r["accuracy"],
            "low": max(0.0, r["accuracy"] - r["margin"]),
            "high": min(1.0, r["accuracy"] + r["margin"]),
        }
        for r in rows
    ]
    with pyplot.rc_context(style(THEMES["light"])):
        figure = frontier(points, Styles(points, baseline=""), "operations", "GFLOP a position, of both models")
        if figure is not None:
            figure.savefig(folder / "pareto.png", dpi=110, bbox_inches="tight")
            pyplot.close(figure)
        tasks = list(dict.fromkeys(p["task"] for p in points))
        figure, axes = panels([t.replace("_", " ") for t in tasks])
        methods = list(dict.fromkeys(p["group"] for p in points))
        for column, (task, ax) in enumerate(zip(tasks, axes, strict=False)):
            here = [p for p in points if p["task"] == task]
            high = [100 * p["accuracy"] for p in here]
            spread = [
                [100 * (p["accuracy"] - p["low"]) for p in here],
                [100 * (p["high"] - p["accuracy"]) for p in here],
            ]
            names = [f"{p['group']}\n{p['setting']}" for p in here]
            colours = [HUES[methods.index(p["group"]) % len(HUES)] for p in here]
            ax.barh(names, high, xerr=spread, color=colours, height=0.6, error_kw={"elinewidth": 0.8, "alpha": 0.5})
            ax.invert_yaxis()
            if column % 3:  # the same names as of the panel to its left
                ax.set_yticklabels([])
            ax.set_xlim(0, 105)
            ax.tick_params(axis="y", labelsize=7)
            ax.set_xlabel("accuracy %")
        figure.savefig(folder / "accuracy.png", dpi=110, bbox_inches="tight")
        pyplot.close(figure)
