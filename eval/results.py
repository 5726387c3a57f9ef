"""From measured cells to what people read: rows, who wins where, CSV, and the tables of READMEs."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from eval.stats import mcnemar, wilson
from shared.trace import KINDS

LEVEL = 0.05  # below this chance a difference of accuracy is not called noise


def row_of(cell: dict, baseline: dict | None) -> dict:
    """The figures of a cell. ``solved``: one digit a problem; ``p``: McNemar's test against the baseline on the same problems."""
    count, tokens = len(cell["docs"]), sum(cell["tokens"])
    solved = [v > 0.5 for v in cell["values"]]
    low, high = wilson(sum(cell["values"]), count)
    verifies = sum(cell["accepted"].values())
    row = {
        k: cell[k]
        for k in ("family", "setting", "group", "decoder", "pretrained", "preset", "options", "task", "metric", "where")
    }
    row |= {
        "problems": count,
        "accuracy": sum(cell["values"]) / count,
        "low": low,
        "high": high,
        "tokens": tokens,
        "forwards_per_token": sum(cell["forwards"].values()) / max(1, tokens),
        "by_kind": {k: cell["forwards"].get(k, 0) / max(1, tokens) for k in KINDS},
        "accepted_per_verify": sum(int(k) * n for k, n in cell["accepted"].items()) / verifies if verifies else None,
        "verifies": verifies,
        "seconds": cell["seconds"],
        "tokens_per_second": tokens / cell["seconds"] if cell["seconds"] else None,
        "same": cell["same"],
        "lossless": None if cell["lossless"] is None else bool(cell["lossless"][0]),
        "solved": "".join("01"[s] for s in solved),
    }
    if baseline is not None and baseline["docs"] == cell["docs"]:
        better, worse, p = mcnemar(solved, [v > 0.5 for v in baseline["values"]])
        row |= {"better": better, "worse": worse, "p": p}
    return row


def rows_of(cells: list[dict], baseline: str) -> list[dict]:
    """A row for every cell, each compared with the baseline of its family and task."""
    base = {(c["family"], c["pretrained"], c["task"]): c for c in cells if c["setting"] == baseline}
    return [row_of(c, base.get((c["family"], c["pretrained"], c["task"]))) for c in cells]


def is_plain(row: dict) -> bool:
    """Diffusion that verifies nothing; block size one is none."""
    return not row["verifies"] and row["options"].get("block_length") != 1


def winners(rows: list[dict], baseline: str) -> list[dict]:
    """Who is cheapest at equal accuracy, by family, checkpoint, task and measure of cost.

    ``bar`` "at least": settings that solve at least as many problems as the baseline; "not below": those whose loss against it may be noise (McNemar).
    ``plain`` and ``speculative`` are the cheapest of each kind among them, None where none is; ``gain`` is how many times cheaper the latter is.
    """
    found = []
    several = len({(r["family"], r["pretrained"]) for r in rows}) > len({r["family"] for r in rows})
    for contest in dict.fromkeys((r["family"], r["pretrained"], r["task"]) for r in rows):
        here = [r for r in rows if (r["family"], r["pretrained"], r["task"]) == contest]
        family, task = " ".join(contest[:2]) if several else contest[0], contest[2]
        first = next((r for r in here if r["setting"] == baseline), None)
        if first is None:
            continue
        for bar, passes in _bars(first).items():
            for cost, of in COSTS.items():
                plain = min((r for r in here if is_plain(r) and passes(r)), key=of, default=None)
                spec = min((r for r in here if r["verifies"] and passes(r)), key=of, default=None)
                gain = of(plain) / of(spec) if plain and spec else None
                found.append({"family": family, "task": task, "bar": bar, "cost": cost, "baseline": first, "plain": plain,
                              "speculative": spec, "gain": gain})  # fmt: skip
    return found


COSTS: dict[str, Callable[[dict], float]] = {
    "forwards / token": lambda r: r["forwards_per_token"],
    "seconds": lambda r: 1 / r["tokens_per_second"] if r["tokens_per_second"] else float("inf"),
}


def _bars(baseline: dict) -> dict[str, Callable[[dict], bool]]:
    return {
        "at least": lambda r: r["accuracy"] >= baseline["accuracy"],
        "not below": lambda r: r["accuracy"] >= baseline["accuracy"] or r.get("p", 0.0) >= LEVEL,
    }


def write_csv(path: Path, rows: list[dict]) -> None:
    """One line a row; forwards by kind in columns of their own."""
    names = [k for k in rows[0] if k not in ("by_kind", "options", "where", "solved")]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, *(f"{k}_per_token" for k in KINDS), "options"])
        for r in rows:
            values = [round(v, 6) if isinstance(v := r.get(n), float) else v for n in names]
            kinds = [round(r["by_kind"][k], 6) for k in KINDS]
            writer.writerow([*values, *kinds, json.dumps(r["options"])])


# Tables of READMEs; `eval.docs` puts them there.


def _table(head: list[str], lines: list[list[str]]) -> Iterator[str]:
    for line in (head, ["---"] * len(head), *lines):
        yield f"| {' | '.join(line)} |"


def _percent(row: dict) -> str:
    return f"{100 * row['accuracy']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"


def rows_table(rows: list[dict], results: dict) -> Iterator[str]:
    """Settings on one task."""
    head = [
        "setting",
        "accuracy % (95 %)",
        "forwards / token",
        "prefill, draft, verify, commit",
        "accepted / verify",
        "p",
        "texts as baseline",
    ]
    lines = []
    for r in rows:
        accepted = "" if r["accepted_per_verify"] is None else f"{r['accepted_per_verify']:.1f}"
        kinds = ", ".join(f"{r['by_kind'][k]:.3f}" for k in KINDS)
        same = "" if r["same"] is None else f"{r['same']} / {r['problems']}"
        p = "" if r.get("p") is None else f"{r['p']:.2g}"
        lines.append([r["setting"], _percent(r), f"{r['forwards_per_token']:.3f}", kinds, accepted, p, same])
    return _table(head, lines)


def winners_table(rows: list[dict], results: dict) -> Iterator[str]:
    """Plain against speculative at equal accuracy, by forwards."""
    head = [
        "family",
        "task",
        "accuracy of the baseline",
        "accuracy asked",
        "plain diffusion",
        "S2D2",
        "S2D2 is cheaper by",
    ]
    lines = []
    for w in winners(rows, results["grid"]["baseline"]):
        if w["cost"] == "forwards / token":
            gain = "" if w["gain"] is None else f"**{w['gain']:.2f} x**" if w["gain"] > 1 else f"{w['gain']:.2f} x"
            asked = "the same or more" if w["bar"] == "at least" else "not significantly less"
            lines.append(
                [
                    w["family"],
                    w["task"],
                    _percent(w["baseline"]),
                    asked,
                    _cell(w["plain"]),
                    _cell(w["speculative"]),
                    gain,
                ]
            )
    return _table(head, lines)


def _cell(row: dict | None) -> str:
    return (
        "none" if row is None else f"{row['setting']}: {100 * row['accuracy']:.1f} % at {row['forwards_per_token']:.3f}"
    )


def families_table(rows: list[dict], results: dict) -> Iterator[str]:
    """One line a family and setting; accuracy on every task, cost over all of them."""
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    head = [
        "family",
        "setting",
        *(f"{t} %" for t in tasks),
        "forwards / token",
        "accepted / verify",
        "lossless",
    ]
    lines = []
    for family, setting in dict.fromkeys((r["family"], r["setting"]) for r in rows):
        here = {r["task"]: r for r in rows if (r["family"], r["setting"]) == (family, setting)}
        tokens, verifies = sum(r["tokens"] for r in here.values()), sum(r["verifies"] for r in here.values())
        forwards = sum(r["forwards_per_token"] * r["tokens"] for r in here.values()) / tokens
        taken = sum((r["accepted_per_verify"] or 0) * r["verifies"] for r in here.values())
        cells = [f"{100 * here[t]['accuracy']:.1f}" if t in here else "" for t in tasks]
        lossless = "yes" if all(r["lossless"] for r in here.values()) else "no"
        lines.append(
            [
                family,
                setting,
                *cells,
                f"{forwards:.3f}",
                f"{taken / verifies:.1f}" if verifies else "",
                lossless,
            ]
        )
    return _table(head, lines)


TABLES = {"rows": rows_table, "winners": winners_table, "families": families_table}
