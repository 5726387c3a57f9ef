"""The plots of a comparison as PNG files, each for light and for dark pages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from eval.calibration import merged
from eval.results import lanes_differ

THEMES = {
    "light": {"ground": "#ffffff", "ink": "#1d2330", "line": "#dfe2e8"},
    "dark": {"ground": "#1a1f29", "ink": "#e6e9ef", "line": "#343c4b"},
}
HUES = ("#4d86e8", "#e58a3a", "#35a36a", "#9b7be0", "#d8577f", "#2fa9b5", "#b59a2d", "#7d8597")
NEUTRAL = "#8a93a3"
MARKS = ("o", "s", "^", "D", "v", "P")


class Styles:
    """A colour for each stem of a group's name (without ``B=16``), a mark for each member, grey for the baseline."""

    def __init__(self, rows: list[dict], baseline: str):
        self.baseline = {r["group"] for r in rows if r["setting"] == baseline}
        self.groups = list(dict.fromkeys(r["group"] for r in rows))
        self.stems: dict[str, list[str]] = {}
        for group in self.groups:
            if group not in self.baseline:
                self.stems.setdefault(self.stem(group), []).append(group)

    @staticmethod
    def stem(group: str) -> str:
        return re.sub(r"\s*\bB=\d+", "", group)

    def of(self, group: str) -> dict:
        if group in self.baseline:
            return {"color": NEUTRAL, "marker": "*"}
        stem = self.stem(group)
        place = list(self.stems).index(stem)
        return {"color": HUES[place % len(HUES)], "marker": MARKS[self.stems[stem].index(group) % len(MARKS)]}


def draw(results: dict, cells: list[dict], folder: Path) -> dict[str, Path]:
    """Write every plot that the cells have data for; ``{name-theme: path}``."""
    rows = results["rows"]
    styles = Styles(rows, results["grid"]["baseline"])
    plots: dict[str, Callable[[], Figure | None]] = {
        "forwards": lambda: frontier(rows, styles, "forwards_per_token", "forwards / token"),
        "floor": lambda: (
            frontier(rows, styles, "floor_seconds_per_token", "floor seconds / token") if lanes_differ(rows) else None
        ),
        "speed": lambda: frontier(rows, styles, "tokens_per_second", "tokens / s"),
        "accepted": lambda: accepted(cells, styles),
        "calibration": lambda: calibration(cells),
    }
    found = {}
    for theme, colours in THEMES.items():
        with pyplot.rc_context(style(colours)):
            for name, make in plots.items():
                figure = make()
                if figure is not None:
                    found[f"{name}-{theme}"] = folder / f"{name}-{theme}.png"
                    figure.savefig(found[f"{name}-{theme}"], dpi=110, bbox_inches="tight")
                    pyplot.close(figure)
    return found


def style(colours: dict) -> dict:
    ink, ground = colours["ink"], colours["ground"]
    ink_keys = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(ink_keys, ink),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), ground),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), colours["line"]),
        "font.size": 10,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }


def panels(titles: list[str], width: float = 4.6, height: float = 3.7) -> tuple[Figure, list[Axes]]:
    columns = min(3, len(titles))
    lines = -(-len(titles) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(width * columns, height * lines), squeeze=False)
    flat = list(axes.flat)
    for ax in flat[len(titles) :]:
        ax.set_visible(False)
    for ax, title in zip(flat, titles, strict=False):
        ax.set_title(title, fontsize=11, fontweight="bold", loc="left")
    figure.subplots_adjust(wspace=0.22, hspace=0.38)
    return figure, flat


def _legend(figure: Figure, axes: list[Axes]) -> None:
    """One legend under all panels."""
    found = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        figure.legend(found.values(), found.keys(), loc="upper center", bbox_to_anchor=(0.5, -0.02), ncol=4, fontsize=9)


def frontier(rows: list[dict], styles: Styles, cost: str, label: str) -> Figure | None:
    """Accuracy against ``cost``, one panel a task, one line a group, with 95 percent intervals."""
    rows = [r for r in rows if r.get(cost)]
    if not rows:
        return None
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    figure, axes = panels([t.replace("_", " ") for t in tasks])
    for task, ax in zip(tasks, axes, strict=False):
        for group in styles.groups:
            here = sorted((r for r in rows if (r["task"], r["group"]) == (task, group)), key=lambda r: r[cost])
            if here:
                _points(ax, here, cost, group, styles.of(group))
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        ax.xaxis.set_minor_formatter(FuncFormatter(_sparse))
        ax.tick_params(axis="x", which="both", labelsize=8)
        ax.set_xlabel(label)
    axes[0].set_ylabel("accuracy %")
    _legend(figure, axes)
    return figure


def _sparse(x: float, _) -> str:
    """Labels of a logarithmic axis between its powers: 2 and 5 of each."""
    first = f"{x:e}"[0]
    return f"{x:g}" if first in "25" else ""


def _points(ax: Axes, rows: list[dict], cost: str, group: str, style: dict) -> None:
    x, y = [r[cost] for r in rows], [100 * r["accuracy"] for r in rows]
    low = [100 * (r["accuracy"] - r["low"]) for r in rows]
    high = [100 * (r["high"] - r["accuracy"]) for r in rows]
    size = 11 if style["marker"] == "*" else 5
    ax.errorbar(x, y, yerr=[low, high], fmt="none", ecolor=style["color"], elinewidth=0.8, alpha=0.35)
    ax.plot(x, y, lw=1.1, ms=size, label=group, alpha=0.9, **style)


def accepted(cells: list[dict], styles: Styles) -> Figure | None:
    """Shares of verifies that accept so many drafts, one panel a task; members of a group are added up."""
    cells = [c for c in cells if c["accepted"]]
    if not cells:
        return None
    tasks = list(dict.fromkeys(c["task"] for c in cells))
    figure, axes = panels([t.replace("_", " ") for t in tasks], height=3.1)
    for task, ax in zip(tasks, axes, strict=False):
        for group in dict.fromkeys(c["group"] for c in cells):
            counts = Counter()
            for c in cells:
                if (c["task"], c["group"]) == (task, group):
                    counts.update({int(k): n for k, n in c["accepted"].items()})
            total = sum(counts.values())
            if total:
                lengths = range(max(counts) + 1)
                ax.plot(
                    lengths, [100 * counts[k] / total for k in lengths], lw=1.3, ms=3.5, label=group, **styles.of(group)
                )
        ax.set_xlabel("drafts accepted by a verify")
    axes[0].set_ylabel("% of verifies")
    _legend(figure, axes)
    return figure


def calibration(cells: list[dict]) -> Figure | None:
    """Reliability by tenths: of every predictor over all cells, one panel a family."""
    sums: dict[str, dict[str, list]] = {}
    for c in cells:
        for name, bins in c["calibration"].items():
            if bins and name != "confidence":
                here = sums.setdefault(c["family"], {})
                here[name] = merged(here.get(name), bins)
    if not sums:
        return None
    figure, axes = panels(list(sums), width=6.2, height=4.6)
    for (_, predictors), ax in zip(sums.items(), axes, strict=False):
        ax.plot([0, 1], [0, 1], ls=":", color=NEUTRAL, lw=1)
        for k, (name, bins) in enumerate(predictors.items()):
            full = [b for b in bins if b[0] >= 20]
            if full:
                label = {"accepted": "confidence: accepted", "as baseline": "confidence: the baseline's token"}.get(
                    name, name
                )
                x, y = [b[1] / b[0] for b in full], [b[2] / b[0] for b in full]
                ax.plot(x, y, color=HUES[k % len(HUES)], marker=MARKS[k % len(MARKS)], ms=5, lw=1.2, label=label)
        ax.set_xlabel("predicted")
    axes[0].set_ylabel("observed")
    _legend(figure, axes)
    return figure
