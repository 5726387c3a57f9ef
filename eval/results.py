"""From measured cells to rows, the cheapest settings at equal accuracy, CSV, and the tables of READMEs."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from eval.roofline import Machine
from eval.stats import loss_bound, mcnemar, problems_needed, wilson
from shared.family import FAMILIES
from shared.output import Work
from shared.trace import KINDS

MARGIN = 0.02  # a setting is equal to the baseline where a loss above this is ruled out


def row_of(cell: dict, baseline: dict | None, machine: Machine | None = None) -> dict:
    """The figures of a cell. ``solved``: one digit a problem; ``p``: McNemar's test against the baseline."""
    count, tokens = len(cell["docs"]), sum(cell["tokens"])
    solved = [v > 0.5 for v in cell["values"]]
    low, high = wilson(sum(cell["values"]), count)
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
        **cost_of(cell, max(1, tokens), machine),
        "seconds": cell["seconds"],
        "tokens_per_second": tokens / cell["seconds"] if cell["seconds"] else None,
        "same": cell["same"],
        **{k: cell[k] for k in ("lossless", "lossless_reason", "lossless_relative_to")},
        "solved": "".join("01"[s] for s in solved),
    }
    if baseline is not None and baseline["docs"] == cell["docs"]:
        better, worse, p = mcnemar(solved, [v > 0.5 for v in baseline["values"]])
        row |= {"better": better, "worse": worse, "p": p}
    return row


def cost_of(cell: dict, tokens: int, machine: Machine | None) -> dict:
    """What a token cost in each lane, the least time that takes on ``machine``, and what a verify brought."""
    accepted, verifies = sum(int(k) * n for k, n in cell["accepted"].items()), sum(cell["accepted"].values())
    floor = None
    if machine is not None and cell["work"]:
        works = [Work(**work) for kinds in cell["work"].values() for work in kinds.values()]
        floor = sum(map(machine.floor, works)) / tokens
    return {
        "lane_forwards_per_token": {
            lane: sum(spent["forwards"] for spent in kinds.values()) / tokens for lane, kinds in cell["lanes"].items()
        },
        "floor_seconds_per_token": floor,
        "accepted_per_verify": accepted / verifies if verifies else None,
        "mean_acceptance_length": cell["gained"] / verifies if verifies else None,
        "verifies": verifies,
    }


def rows_of(cells: list[dict], baseline: str, machine: Machine | None = None) -> list[dict]:
    """A row for every cell, each compared with the baseline of its family and task."""
    base = {(c["family"], c["pretrained"], c["task"]): c for c in cells if c["setting"] == baseline}
    return [row_of(c, base.get((c["family"], c["pretrained"], c["task"])), machine) for c in cells]


def family_shown(row: dict, rows: list[dict]) -> str:
    """The family of a row, and its checkpoint where ``rows`` have several of that family."""
    several = len({r["pretrained"] for r in rows if r["family"] == row["family"]}) > 1
    return f"{row['family']} {row['pretrained']}" if several else row["family"]


def is_plain(row: dict) -> bool:
    """Unverified diffusion, block size 1 excluded."""
    return not row["verifies"] and row["options"].get("block_length") != 1


def lanes_of_row(row: dict) -> dict[str, float]:
    """Forwards per token by lane; of a row recorded before lanes were, none."""
    return row.get("lane_forwards_per_token") or {}


def lanes_differ(rows: list[dict]) -> bool:
    """Are forwards of different models among them, so that their numbers do not compare?"""
    return len({lane for row in rows for lane in lanes_of_row(row)}) > 1


# What winners are ranked by.
COSTS: dict[str, Callable[[dict], float]] = {
    "forwards / token": lambda r: r["forwards_per_token"],
    "floor ms / token": lambda r: 1e3 * r["floor_seconds_per_token"],
    "seconds": lambda r: 1 / r["tokens_per_second"] if r["tokens_per_second"] else float("inf"),
}


def costs_of(rows: list[dict]) -> list[str]:
    """What rows are ranked by: the floor where their lanes differ and all have one, else forwards; and seconds."""
    floors = lanes_differ(rows) and all(r.get("floor_seconds_per_token") is not None for r in rows)
    return ["floor ms / token" if floors else "forwards / token", "seconds"]


def winners(rows: list[dict], baseline: str) -> list[dict]:
    """The cheapest settings at equal accuracy, by family, checkpoint, task and measure of cost.

    ``bar`` "at least": settings that solve at least as many problems as the baseline; "equal": those shown to lose less
    than `MARGIN` (see `is_equal`). ``needed``: of each kind that has none, how many problems would do for one of its
    settings (None: no number would). ``plain`` and ``speculative`` are the cheapest of each kind among them, None where
    none is; ``gain`` is how many times cheaper the latter is.
    """
    found = []
    for contest in dict.fromkeys((r["family"], r["pretrained"], r["task"]) for r in rows):
        here = [r for r in rows if (r["family"], r["pretrained"], r["task"]) == contest]
        family, task = family_shown(here[0], rows), contest[2]
        first = next((r for r in here if r["setting"] == baseline), None)
        if first is None:
            continue
        for bar, passes in _bars(first).items():
            for cost in costs_of(here):
                of = COSTS[cost]
                plain = min((r for r in here if is_plain(r) and passes(r)), key=of, default=None)
                spec = min((r for r in here if r["verifies"] and passes(r)), key=of, default=None)
                gain = of(plain) / of(spec) if plain and spec else None
                needed = {
                    "plain": needed_by(filter(is_plain, here)),
                    "speculative": needed_by(r for r in here if r["verifies"]),
                }
                about = {"family": family, "task": task, "bar": bar, "cost": cost, "baseline": first}
                found.append({**about, "plain": plain, "speculative": spec, "gain": gain, "needed": needed})
    return found


def _bars(baseline: dict) -> dict[str, Callable[[dict], bool]]:
    return {
        "at least": lambda r: r["accuracy"] >= baseline["accuracy"],
        "equal": lambda r: is_equal(r, baseline),
    }


def is_equal(row: dict, baseline: dict) -> bool:
    """Is it the baseline, a lossless decoder that gives the baseline's very texts, or shown to lose less than `MARGIN`
    (non-inferiority, 95 percent)?"""
    if row is baseline or (row.get("lossless") and row.get("same") is not None and row["same"] == row["problems"]):
        return True
    return "better" in row and loss_bound(row["worse"], row["better"], row["problems"]) <= MARGIN


def needed_by(rows: Iterable[dict]) -> int | None:
    """The fewest problems that would show one of the settings equal, were its shares as they are."""
    known = (r for r in rows if "better" in r)
    found = [problems_needed(r["worse"], r["better"], r["problems"], MARGIN) for r in known]
    return min((n for n in found if n is not None), default=None)


def write_csv(path: Path, rows: list[dict]) -> None:
    """One line a row; forwards by kind and by lane in columns of their own."""
    apart = ("by_kind", "lane_forwards_per_token", "options", "where", "solved")
    names = [k for k in rows[0] if k not in apart]
    lanes = list(dict.fromkeys(lane for r in rows for lane in lanes_of_row(r)))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        by_lane = [f"{lane}_forwards_per_token" for lane in lanes]
        writer.writerow([*names, *(f"{k}_per_token" for k in KINDS), *by_lane, "options"])
        for r in rows:
            numbers = [r.get(n) for n in names] + [r["by_kind"][k] for k in KINDS]
            numbers += [lanes_of_row(r).get(lane) for lane in lanes]
            writer.writerow([*(_short(n) for n in numbers), json.dumps(r["options"])])


def _short(value):
    """A number with as many digits as say something."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


# Tables of READMEs; `eval.docs` puts them there.


def _table(head: list[str], lines: list[list[str]]) -> Iterator[str]:
    for line in (head, ["---"] * len(head), *lines):
        yield f"| {' | '.join(line)} |"


def _percent(row: dict) -> str:
    return f"{100 * row['accuracy']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"


def _by_lane(row: dict) -> list[str]:
    """Two cells: forwards per token by lane, and the least time a token takes."""
    floor = row.get("floor_seconds_per_token")
    lanes = ", ".join(f"{lane} {n:.3f}" for lane, n in lanes_of_row(row).items())
    return [lanes, "" if floor is None else f"{1e3 * floor:.3f}"]


BY_LANE = ["forwards / token by lane", "floor ms / token"]


def method_of(rows: list[dict]) -> str:
    """What the families in ``rows`` call their speculation."""
    names = {FAMILIES[r["family"]].method if r["family"] in FAMILIES else "speculative" for r in rows}
    return names.pop() if len(names) == 1 else "speculative"


def rows_table(rows: list[dict], results: dict) -> Iterator[str]:
    """Settings on one task."""
    differ = lanes_differ(rows)
    head = ["setting", "accuracy % (95 %)", "forwards / token", "prefill, draft, verify, commit"]
    head += [*BY_LANE, "tokens / verify"] if differ else []
    head += ["accepted / verify", "p", "texts as baseline"]
    lines = []
    for r in rows:
        kinds = ", ".join(f"{r['by_kind'][k]:.3f}" for k in KINDS)
        same = "" if r["same"] is None else f"{r['same']} / {r['problems']}"
        p = "" if r.get("p") is None else f"{r['p']:.2g}"
        by_lane = [*_by_lane(r), _one_digit(r.get("mean_acceptance_length"))] if differ else []
        cost = [f"{r['forwards_per_token']:.3f}", kinds, *by_lane, _one_digit(r["accepted_per_verify"])]
        lines.append([r["setting"], _percent(r), *cost, p, same])
    return _table(head, lines)


def _one_digit(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def winners_table(rows: list[dict], results: dict) -> Iterator[str]:
    """Plain against speculative decoding at equal accuracy, by the work they do."""
    method = method_of(rows)
    head = ["family", "task", "accuracy of the baseline", "accuracy asked", "plain diffusion", method]
    head.append(f"{method} is cheaper by")
    lines = []
    for w in winners(rows, results["grid"]["baseline"]):
        if w["cost"] != "seconds":
            gain = "" if w["gain"] is None else f"**{w['gain']:.2f} x**" if w["gain"] > 1 else f"{w['gain']:.2f} x"
            asked = "the same or more" if w["bar"] == "at least" else f"less by {100 * MARGIN:.0f} points at most"
            shown = [_cell(w[kind], w["cost"], w["bar"], w["needed"][kind]) for kind in ("plain", "speculative")]
            lines.append([w["family"], w["task"], _percent(w["baseline"]), asked, *shown, gain])
    return _table(head, lines)


def _cell(row: dict | None, cost: str, bar: str, needed: int | None) -> str:
    if row is None:
        return f"cannot tell, {needed} would do" if bar == "equal" and needed else "none"
    unit = " ms" if cost.startswith("floor") else ""
    return f"{row['setting']}: {100 * row['accuracy']:.1f} % at {COSTS[cost](row):.3f}{unit}"


def families_table(rows: list[dict], results: dict) -> Iterator[str]:
    """One line a family and setting; accuracy on every task, cost over all of them."""
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    differ = lanes_differ(rows)
    head = ["family", "setting", *(f"{t} %" for t in tasks), "forwards / token"]
    head += [*(BY_LANE if differ else []), "accepted / verify", "lossless"]
    several = len({r.get("lossless_relative_to") for r in rows}) > 1
    lines = []
    for what in dict.fromkeys((r["family"], r["pretrained"], r["setting"]) for r in rows):
        here = {r["task"]: r for r in rows if (r["family"], r["pretrained"], r["setting"]) == what}
        family, setting = family_shown(next(iter(here.values())), rows), what[2]
        cells = [f"{100 * here[t]['accuracy']:.1f}" if t in here else "" for t in tasks]
        over = over_tasks(list(here.values()))
        cost = [f"{over['forwards_per_token']:.3f}", *(_by_lane(over) if differ else [])]
        lossless = "yes" if all(r["lossless"] for r in here.values()) else "no"
        if several:
            lossless += f" (relative to {next(iter(here.values())).get('lossless_relative_to')})"
        lines.append([family, setting, *cells, *cost, _one_digit(over["accepted_per_verify"]), lossless])
    return _table(head, lines)


def over_tasks(rows: list[dict]) -> dict:
    """The cost of one setting over all its tasks, a token each counting the same; a figure that a row lacks is None."""
    tokens, verifies = sum(r["tokens"] for r in rows), sum(r["verifies"] for r in rows)

    def mean(of: Callable[[dict], float | None]) -> float | None:
        values = [of(r) for r in rows]
        return None if None in values else sum(v * r["tokens"] for v, r in zip(values, rows, strict=True)) / tokens

    lanes = dict.fromkeys(lane for r in rows for lane in lanes_of_row(r))
    taken = sum((r["accepted_per_verify"] or 0) * r["verifies"] for r in rows)
    return {
        "forwards_per_token": mean(lambda r: r["forwards_per_token"]),
        "lane_forwards_per_token": {lane: mean(lambda r, lane=lane: lanes_of_row(r).get(lane, 0.0)) for lane in lanes},
        "floor_seconds_per_token": mean(lambda r: r.get("floor_seconds_per_token")),
        "accepted_per_verify": taken / verifies if verifies else None,
    }


TABLES = {"rows": rows_table, "winners": winners_table, "families": families_table}
