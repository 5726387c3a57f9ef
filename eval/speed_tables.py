"""Tables of READMEs from what `eval.benchmark` recorded."""

from __future__ import annotations


def speed_tables(result: dict) -> str:
    """The machine, its forwards against their floors, and the decodes, as Markdown."""
    machine = result["machine"]
    lines = [
        f"{machine['name']}, torch {result['torch']}: reads {machine['read_bytes_per_second'] / 1e12:.2f} TB/s, {result['dtype']} products "
        f"{machine['operations_per_second'] / 1e12:.0f} TFLOP/s. Context {result['context']}, block length {result['block_length']}; "
        f"{result['capture_seconds']:.0f} s to capture graphs.",
        "",
    ]
    # Records made before there was a table of datasheets have no such share.
    known = any(r.get("of_datasheet") is not None for r in result["forwards"])
    head = ["forward", "ms", "floor ms", "over the floor"] + ["% of the datasheet bandwidth"] * known
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for r in result["forwards"]:
        cells = [r["forward"], f"{r['ms']:.2f}", f"{r['floor_ms']:.2f}", f"{r['over_floor']:.2f} x"]
        if known:
            cells.append("" if r["of_datasheet"] is None else f"{100 * r['of_datasheet']:.0f}")
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
