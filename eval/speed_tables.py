"""Tables of READMEs from what `eval.benchmark` recorded."""

from __future__ import annotations

from eval.roofline import Machine


def share_of_datasheet(machine: Machine, forward: dict) -> float | None:
    """The share of its datasheet's bandwidth at which ``machine`` read a ``forward``; None where either is unknown."""
    return machine.of_datasheet(forward["read_bytes"] / (forward["ms"] / 1e3)) if "read_bytes" in forward else None


def speed_tables(result: dict) -> str:
    """The machine, its forwards against their floors, and the decodes, as Markdown."""
    machine = result["machine"]
    lines = [
        f"{machine['name']}, torch {result['torch']}: reads {machine['read_bytes_per_second'] / 1e12:.2f} TB/s, "
        f"{result['dtype']} products {machine['operations_per_second'] / 1e12:.0f} TFLOP/s. "
        f"Context {result['context']}, block length {result['block_length']}; "
        f"{result['capture_seconds']:.0f} s to capture graphs.",
        "",
    ]
    shares = [share_of_datasheet(Machine.from_json(machine), r) for r in result["forwards"]]
    known = any(share is not None for share in shares)
    head = ["forward", "ms", "floor ms", "over the floor"] + ["% of the datasheet bandwidth"] * known
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for r, share in zip(result["forwards"], shares, strict=True):
        cells = [r["forward"], f"{r['ms']:.2f}", f"{r['floor_ms']:.2f}", f"{r['over_floor']:.2f} x"]
        if known:
            cells.append("" if share is None else f"{100 * share:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    if result["decodes"]:
        head = ["decode", "tokens/s", "forwards/token", "ms a forward in the loop", "ms a step outside forwards"]
        head.append("memory over weights and cache")
        lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for r in result["decodes"]:
        outside, memory = r.get("ms_per_step_outside_forwards"), r.get("peak_memory_over_weights_and_cache")
        cells = [
            f"{r['decode']}, batch {r['rows']}",
            f"{r['tokens_per_second']:.0f}",
            f"{r['forwards_per_token']:.3f}",
            f"{r['ms_per_forward_in_loop']:.2f}",
            "" if outside is None else f"{outside:.2f}",
            "" if memory is None else f"{memory:.3f} x",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
