"""The report of a comparison: one HTML file with its style, its logic, its plots and its data in it."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from string import Template

from eval.grid import Setting
from eval.results import COSTS, MARGIN, family_shown, lanes_differ, winners

_FILES = Path(__file__).parent / "report"
_HOWS = ("accepted", "resampled", "bonus", "confident", "fallback", "forced", "filled", "next", "ratio", "edited")
_CAPTIONS = {
    "forwards": "Accuracy against forwards per token; bars are 95 % intervals. Up and to the left is better.",
    "floor": "Accuracy against the least time a token takes: the bytes and operations of every model's forwards at the "
    "measured rates of the machine. Up and to the left is better.",
    "speed": "Accuracy against tokens per second of the whole batch. Up and to the right is better.",
    "accepted": "How many drafted tokens a verify accepts.",
    "calibration": "Calibration: the confidence of a drafter or an estimator in a token, against how often the "
    "verifier accepts it, or how often it is the baseline's token. On the diagonal the confidence is right.",
}


def render(results: dict, cells: list[dict], pictures: dict[str, Path]) -> str:
    """The page. ``pictures``: plots by name, each with ``-light`` and ``-dark``."""
    grid, rows = results["grid"], results["rows"]
    data = {
        "grid": grid,
        "rows": [r | {"family": family_shown(r, rows)} for r in rows],
        "by_lane": lanes_differ(rows),
        "replays": [r | {"family": family_shown(cell, rows)} for cell in cells for r in replays_of(cell)],
    }
    where = rows[0]["where"]
    facts = [f"{k.replace('_', ' ')} {where[k]}" for k in ("device", "dtype", "batch_size", "processes", "torch")]
    return Template((_FILES / "template.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(grid["name"]),
        about=html.escape(grid["about"]),
        facts=html.escape(f"{', '.join(facts)}; baseline: {grid['baseline']}; {grid['finished']}"),
        style=(_FILES / "report.css").read_text(encoding="utf-8"),
        script=(_FILES / "report.js").read_text(encoding="utf-8"),
        winners=winners_rows(rows, grid["baseline"]),
        legend="".join(f'<span style="--c:var(--{h})">{h}</span>' for h in legend_of(data["replays"])),
        kinds="".join(f'<span style="--c:var(--{k})">{k}</span>' for k in rows[0]["by_kind"]),
        figures="".join(figure(name, pictures) for name in _CAPTIONS if f"{name}-light" in pictures),
        data=json.dumps(data).replace("</", "<\\/"),
    )


def legend_of(replays: list[dict]) -> list[str]:
    """How positions were decided in these decodes, in the legend's order; the rule fills a confident draft or a
    fallback."""
    found = {how for replay in replays for how in replay["how"]} | {"confident", "fallback"}
    found |= {"edited" for replay in replays if replay["edits"]}
    return [how for how in _HOWS if how in found]


def replays_of(cell: dict) -> list[dict]:
    """The decodes of a cell that the page can play."""
    setting = Setting(cell["setting"], cell["family"], cell["decoder"], {}, "", cell["preset"], cell["options"])
    threshold = setting.resolved().get("confidence_threshold")
    about = {k: cell[k] for k in ("family", "setting", "task")} | {"threshold": threshold}
    solved = dict(zip(map(str, cell["docs"]), cell["values"], strict=True))
    return [{**about, "doc": int(d), "solved": solved[d] > 0.5, **replay} for d, replay in cell["replay"].items()]


def winners_rows(rows: list[dict], baseline: str) -> str:
    """The body of the table of the cheapest settings."""
    head = (
        "family",
        "task",
        "cost",
        "accuracy asked",
        "cheapest plain",
        "cheapest speculative",
        "speculation is cheaper by",
    )
    lines = ["<thead><tr>" + "".join(f"<th>{h}</th>" for h in head) + "</tr></thead><tbody>"]
    for w in winners(rows, baseline):
        asked = f"at least {100 * w['baseline']['accuracy']:.1f} %"
        asked = (
            asked
            if w["bar"] == "at least"
            else f"at most {100 * MARGIN:.0f} points below {100 * w['baseline']['accuracy']:.1f} %"
        )
        gain = "" if w["gain"] is None else f"{w['gain']:.2f} x"
        cells = [
            w["family"],
            w["task"],
            w["cost"],
            asked,
            _shown(w, "plain"),
            _shown(w, "speculative"),
        ]
        won = "number win" if (w["gain"] or 0) > 1 else "number"
        lines.append(
            "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + f'<td class="{won}">{gain}</td></tr>'
        )
    return "".join(lines) + "</tbody>"


def _shown(winner: dict, kind: str) -> str:
    row, cost = winner[kind], winner["cost"]
    if row is None and winner["bar"] == "equal" and winner["needed"][kind]:
        return f"cannot tell, {winner['needed'][kind]} would do"
    if row is None:
        return "none"
    spent = f"{COSTS[cost](row):.3f}" if cost != "seconds" else f"{row['tokens_per_second'] or 0:.0f} tokens/s"
    return f"{row['setting']} ({100 * row['accuracy']:.1f} %, {spent})"


def figure(name: str, pictures: dict[str, Path]) -> str:
    """A plot in its light and its dark form, as the reader's system asks for."""
    light, dark = (
        "data:image/png;base64," + base64.b64encode(pictures[f"{name}-{theme}"].read_bytes()).decode()
        for theme in ("light", "dark")
    )
    alt = html.escape(_CAPTIONS[name], quote=True)
    source = f'<source srcset="{dark}" media="(prefers-color-scheme: dark)">'
    return f'<figure><picture>{source}<img src="{light}" alt="{alt}"></picture><figcaption>{alt}</figcaption></figure>'
