"""Speed of a family's forwards and decoders against the measured limits of the machine.

python -m eval.benchmark                                    # the default family's shipped checkpoint, on what is here
python -m eval.benchmark --family Fast-dLLM-v2              # that family's shipped checkpoint
python -m eval.benchmark --shape sdar-8b --accept 5         # random weights of a named shape, acceptance by a script
python -m eval.benchmark --shape llada2-mini --decodes false  # forwards alone
python -m eval.benchmark --shape sdar-8b --vs mymodule:generate --vs-kwargs '{"block_length": 16}'

Measures read bandwidth and matrix rate first, then milliseconds per forward by kind and size, then whole decodes.

The floor of a forward is the time its bytes or its operations take at those rates (`eval.roofline`). Of a mixture of
experts, the experts that its router chose are counted. Beside the floor stands the datasheet bandwidth: at what share
of it the bytes were read. "outside" is the time of a decoding step that is not spent in its forwards. Random weights
accept nothing, so `--accept N` keeps the first N tokens of every verified span whatever the verifier says; the
acceptance rule still runs. Prints a table, then one JSON line, always last.
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.errors import end_on_interrupt

    end_on_interrupt()

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from eval.hf_style import HFStyle
from eval.roofline import Machine, Touched, forward_work, timed, touched_experts
from eval.shapes import family_of, random_models, shapes
from shared.errors import Parser, UserError, run_main
from shared.family import FAMILIES, DecoderSetting, Family, imported
from shared.gpu.engine import Engine
from shared.gpu.graphs import GraphRunner
from shared.network import masks
from shared.network.loading import CheckpointModel, resolve_device, resolve_dtype
from shared.network.sizes import sizes_of
from shared.network.timed import Forward
from shared.options import Runtime
from shared.output import Output, Work
from shared.policy.accept import Verdict, accept_span
from shared.scripts.files import check_file, write_whole
from shared.scripts.models import checkpoints_of, load_models, other_models


def scripted(accept: int) -> Callable[..., Verdict]:
    """An acceptance rule that runs the real one, then keeps the first ``accept`` tokens and replaces the next."""

    def rule(draft, logits: Tensor, *rest) -> Verdict:
        real = accept_span(draft, logits, *rest)
        place = draft.span.cumsum(-1)
        accepted, rejected = draft.span & (place <= accept), draft.span & (place == accept + 1)
        return Verdict(accepted, rejected, draft.tokens, real.ratio, real.finite)

    return rule


class Forwards:
    """Times single forwards of an engine whose rows all hold ``context`` tokens; ``prefix`` goes before their names."""

    def __init__(self, model, machine: Machine, engine: Engine, length: int, context: int, prefix: str = ""):
        self.model, self.machine, self.engine = model, machine, engine
        self.length, self.context, self.prefix = length, context, prefix
        self.rows: list[dict] = []

    def measure(self, kind: Forward, rows: int) -> float:
        """Seconds of one kind of forward at batch ``rows``; adds a line to the table."""
        cache, device, tokens = self.engine.cache, self.model.device, kind.tokens
        cache.reset(range(len(cache.lengths)))
        cache.commit([self.context] * rows, range(rows))
        index = list(range(rows)) * (2 if kind.commit_rows else 1)
        ahead = [tokens] * rows + [0] * rows if kind.commit_rows else None
        window = cache.window(tokens, index, ahead=ahead, offset=kind.offset, width=kind.width)
        inputs = [torch.randint(vocabulary(self.model), (len(index), tokens), device=device) for _ in range(8)]
        positions = (window.prefix[:, None] + kind.offset + kind.place(device)).clamp(
            max=self.model.config.max_position_embeddings - 1
        )
        at = None if kind.picks is None else torch.tensor(list(kind.picks), device=device).expand(rows, -1)
        local = None if kind.mask is None else kind.mask.expand(len(index), -1, -1)
        how, turn = {"logit_rows": rows, "logits_at": at}, iter(range(1 << 30))
        seconds = timed(lambda: self.engine.forward(inputs[next(turn) % 8], positions, window, local, **how), device)
        touched = touched_experts(self.model, [partial(self.model, i, positions, window, local, **how) for i in inputs])
        work = forward_work(
            self.model,
            entries=len(index),
            tokens=tokens,
            logits=rows * kind.logits,
            context=self.context,
            rows=rows,
            touched=touched,
        )
        self.add(
            f"{kind.name}, {rows} x {tokens} tokens" + (" twice" if kind.commit_rows else ""), seconds, work, touched
        )
        return seconds

    def prefill(self, tokens: int) -> None:
        """A prompt of ``tokens`` into an empty cache, block-causal, no logits."""
        cache, device = self.engine.cache, self.model.device
        cache.reset(range(len(cache.lengths)))
        ids = torch.randint(vocabulary(self.model), (1, tokens), device=device)
        positions = torch.arange(tokens, device=device)[None]
        mask, window = masks.block_causal(tokens, self.length, device), cache.window(tokens, [0])
        call = lambda: self.engine.forward(ids, positions, window, mask, logits_at=slice(0, 0))  # noqa: E731
        seconds = timed(call, device, repeat=5)
        touched = touched_experts(
            self.model, [partial(self.model, ids, positions, window, mask, logits_at=slice(0, 0))]
        )
        work = forward_work(self.model, entries=1, tokens=tokens, logits=0, context=0, causal=True, touched=touched)
        self.add(f"prefill, {tokens} tokens", seconds, work, touched)
        self.rows[-1]["share_of_matrix_rate"] = round(work.operations / seconds / self.machine.rate, 3)

    def add(self, name: str, seconds: float, work: Work, touched: Touched) -> None:
        name, ms, least = self.prefix + name, 1e3 * seconds, 1e3 * self.machine.floor(work)
        line = {"forward": name, "ms": round(ms, 3), "floor_ms": round(least, 3), "over_floor": round(ms / least, 2)}
        share = self.machine.of_datasheet(work.read_bytes / seconds)
        line |= {"read_bytes": round(work.read_bytes), "of_datasheet": None if share is None else round(share, 3)}
        self.rows.append(line)
        shown = "" if share is None else f"   {100 * share:5.1f} % of the datasheet bandwidth"
        print(f"{name:48s} {ms:9.3f} ms   floor {least:8.3f}   {ms / least:5.2f} x{shown}", flush=True)
        if touched.experts:
            sizes = sizes_of(self.model)
            read = touched.experts * sizes.expert * sizes.number_bytes
            line |= {"experts_a_layer": round(touched.experts / sizes.expert_layers, 1), "expert_bytes": round(read)}
            rest = line["read_bytes"] - read
            print(
                f"{'':8s}{line['experts_a_layer']} experts a layer: {read / 1e6:.1f} MB; the rest: {rest / 1e6:.1f} MB"
            )


def vocabulary(model) -> int:
    """Random inputs are ids below this: ordinary tokens, since every vocabulary here has its special ids at the end."""
    return min(1000, model.special_ids()[0])


def prompts_of(model, rows: int, context: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(vocabulary(model)) for _ in range(context)] for _ in range(rows)]


def seconds_in_graphs(runner: GraphRunner, replays: Counter, device) -> float:
    """What ``replays`` of a decode took: each shape's time on its last inputs, times how often it was replayed."""
    seconds = {shape: timed(lambda shape=shape: runner.replay(shape, shape.logit_rows), device) for shape in replays}
    return sum(count * seconds[shape] for shape, count in replays.items())


def seconds_by_kind(output: Output, times: dict, rows: int) -> float:
    """What the forwards of a decode took, by the time of one of its kind in its lane at batch ``rows``; a commit takes
    as long as a draft where it was not timed."""
    seconds = 0.0
    for lane, kinds in output.batch.items():
        for kind in kinds.keys() - {"prefill"}:
            one = times.get((lane, rows, kind), times.get((lane, rows, "draft"), 0.0))
            seconds += kinds[kind].forwards * one
    return seconds


def measure_decode(name: str, decode: TimedDecoder, models: dict, rows: int, args, times: dict) -> dict:
    """One decode of ``rows`` prompts at once, after one to warm up.

    The time outside forwards is that of the decode less its forwards, each by its shape; without graphs by ``times``,
    seconds by (role, rows, name of the forward).
    """
    model = next(iter(models.values()))
    prompts = prompts_of(model, rows, args.context)
    call = {"block_length": args.block_length, "max_new_tokens": args.new_tokens, "stopping_criteria_idx": ()}
    runtime = {"fast": args.fast, "graphs": args.graphs}
    decode(model, prompts, **call, **runtime)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    engines = [m.engine for m in models.values() if m.engine is not None]
    runners = {e.runner: Counter(e.runner.replays) for e in engines if e.runner is not None}
    output = decode(model, prompts, **call, **runtime)
    spent = output.batch_forwards
    steps = spent.get("draft") or spent.get("verify") or 1
    forwards = sum(spent.values()) - spent.get("prefill", 0)
    if runners:
        inside = sum(seconds_in_graphs(r, r.replays - before, model.device) for r, before in runners.items())
    else:
        inside = seconds_by_kind(output, times, rows)
    decoding = output.seconds - output.prefill_seconds
    line = {
        "decode": name,
        "rows": rows,
        "tokens_per_second": round(output.tokens_per_second, 1),
        "forwards_per_token": round(output.forwards_per_token, 4),
        "lane_forwards_per_token": {lane: round(n, 4) for lane, n in output.lane_forwards_per_token.items()},
        "ms_per_forward_in_loop": round(1e3 * decoding / forwards, 3),
        "ms_per_step_outside_forwards": round(1e3 * (decoding - inside) / steps, 3),
        "prefill_ms": round(1e3 * output.prefill_seconds, 2),
        "batch_forwards": spent,
    }
    if model.device.type == "cuda":
        parameters = {p.data_ptr(): p for m in models.values() for p in m.parameters()}
        held = sum(p.nbytes for p in parameters.values()) + sum(e.cache.nbytes for e in engines)
        line["peak_memory_over_weights_and_cache"] = round(torch.cuda.max_memory_reserved() / held, 3)
    print(
        f"{name:40s} batch {rows:3d}  {line['tokens_per_second']:9.1f} tokens/s  "
        f"{line['forwards_per_token']:.3f} forwards/token  "
        f"{line['ms_per_forward_in_loop']:7.3f} ms/forward  "
        f"{line['ms_per_step_outside_forwards']:6.3f} ms/step outside",
        flush=True,
    )
    return line


def users_own(target: str, field: str):
    """What ``module:name``, the value of ``field``, stands for; `UserError` if it cannot be imported."""
    try:
        return imported(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{field} {target!r} cannot be imported ({error}). Allowed: MODULE:NAME") from error


def against(target: str, kwargs: dict, model, args) -> dict:
    """The same prompt and weights through a published decoder: ``function(model, input_ids, **kwargs)``."""
    decode = users_own(target, "vs")
    ids = torch.tensor(prompts_of(model, 1, args.context), device=model.device)
    style, seconds = HFStyle(model), []
    for _ in range(2):
        began = time.perf_counter()
        out = decode(style, ids, **kwargs)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    ids_out = out[0] if isinstance(out, tuple) else out
    tokens = ids_out.shape[-1] - ids.shape[-1]
    print(f"{target:40s} batch   1  {tokens / seconds[-1]:9.1f} tokens/s")
    return {"decode": target, "rows": 1, "tokens_per_second": round(tokens / seconds[-1], 1)}


def profile(decode: TimedDecoder, model, args, path: str) -> None:
    """Kernel names and times of a short decode at batch 1, per decoding step, to ``path``."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    on_gpu = model.device.type == "cuda"
    call = {
        "block_length": args.block_length,
        "max_new_tokens": 4 * args.block_length,
        "stopping_criteria_idx": (),
    }
    with profiler(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as record:
        output = decode(model, prompts_of(model, 1, args.context), **call, fast=args.fast, graphs=args.graphs)
    steps = output.batch_forwards.get("draft", 1)
    time_of = (lambda e: e.self_device_time_total) if on_gpu else (lambda e: e.self_cpu_time_total)
    events = sorted(record.key_averages(), key=time_of, reverse=True)
    lines = [f"{steps} steps, forwards {output.batch_forwards}; microseconds and launches a step"]
    lines += [f"{time_of(e) / steps:10.1f} {e.count / steps:7.1f}  {e.key[:110]}" for e in events if time_of(e)]
    write_whole(path, "\n".join(lines) + "\n")


def true_or_false(text: str) -> bool:
    """Either word; argparse complains of anything else."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}. Allowed: true, false")
    return text == "true"


def check(args) -> None:
    """Raise `UserError` for what cannot be measured; make the folders of the files to write."""
    for name in ("context", "new_tokens", "prefill", "batch", "accept"):
        value = getattr(args, name)
        least = 0 if name == "accept" else 1
        if value is not None and min(value if isinstance(value, list) else [value]) < least:
            raise UserError(f"{name} is {value}. Allowed: at least {least}")
    for name in ("json", "profile"):
        if (path := getattr(args, name)) is not None:
            check_file(name, path)
            Path(path).parent.mkdir(parents=True, exist_ok=True)
    if args.vs:
        users_own(args.vs, "vs")


def parser() -> argparse.ArgumentParser:
    flags = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--family", choices=FAMILIES, help="default: that of the shape or model, else the default one")
    flags.add_argument("--model", help="a checkpoint (default: the family's shipped one, unless --shape is given)")
    flags.add_argument("--shape", choices=sorted(shapes()), help="random weights of this shape instead")
    flags.add_argument("--accept", type=int, help="accept this many tokens of every verified span, by script")
    flags.add_argument("--block_length", type=int, help="default: the family's")
    flags.add_argument("--context", type=int, default=512)
    flags.add_argument("--new_tokens", type=int, default=256)
    flags.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    flags.add_argument("--prefill", type=int, default=2048)
    flags.add_argument("--device", default="auto")
    flags.add_argument("--dtype", default="auto")
    flags.add_argument("--fast", type=true_or_false, help="true or false; default: where it can run")
    flags.add_argument("--graphs", type=true_or_false, help="true or false; default: where it can run")
    flags.add_argument("--decodes", type=true_or_false, default=True, help="true or false: time decodes too")
    flags.add_argument("--vs", help="MODULE:FUNCTION, a decoder with the published signature, on the same weights")
    flags.add_argument("--vs-kwargs", type=json.loads, default={}, help="its keyword arguments, as JSON")
    flags.add_argument("--profile", help="write kernel names and times of one speculative step at batch 1 to this file")
    flags.add_argument("--json", help="also write the result to this file")
    return flags


def parse(argv: list[str] | None) -> argparse.Namespace:
    return parser().parse_args(argv)


def load(args, family: Family) -> dict[str, CheckpointModel]:
    """The models to measure, by role; bounds what ``args`` ask of them by their positions."""
    device = resolve_device(args.device)
    if args.shape:
        models = random_models(family, args.shape, device, resolve_dtype(args.dtype, torch.bfloat16, device))
    else:
        checkpoints = (
            checkpoints_of(family, args.model) if args.model else family.checkpoints(next(iter(family.shipped)))
        )
        models = load_models(family, checkpoints, dtype=args.dtype, device=device)
    room = min(model.config.max_position_embeddings for model in models.values())
    args.block_length = args.block_length or family.block_length
    fit = {"context": min(args.context, room // 2), "prefill": min(args.prefill, room)}
    for name, value in fit.items():
        if value < getattr(args, name):
            print(f"{name} {getattr(args, name)} does not fit {room} positions: {value}")
            setattr(args, name, value)
    return models


def measure_forwards(model, family: Family, role: str, machine: Machine, args) -> tuple[Engine, Forwards, dict]:
    """``(engine, table, seconds by (role, rows, name of the forward))`` of the network of a role."""
    length, timed_of = args.block_length, family.timed[role].of(model)
    blocks = -(-(args.context + args.new_tokens) // length) * length
    slots, runtime = max(blocks + 2 * length, args.prefill), Runtime(fast=args.fast, graphs=args.graphs)
    if model.device.type == "cuda" and args.graphs is not False:
        print(
            "capturing CUDA graphs; the first time on a machine their kernels are compiled, a minute or two", flush=True
        )
    engine = Engine.of(model, max(args.batch), slots, imported(timed_of.kinds)(length), runtime)
    prefix = f"{role}: " if len(family.timed) > 1 else ""
    times, table = {}, Forwards(model, machine, engine, length, args.context, prefix)
    for rows in args.batch:
        for kind in imported(timed_of.forwards)(length, model.device):
            times[role, rows, kind.name] = table.measure(kind, rows)
    table.prefill(args.prefill)
    print(f"graphs: {engine.capture_seconds:.1f} s to capture {len(engine.runner.captured) if engine.runner else 0}\n")
    return engine, table, times


class TimedDecoder:
    """A decoder of a family with the keywords of one of its settings, as the benchmark calls it."""

    def __init__(self, family: Family, setting: DecoderSetting, models: dict, **more):
        decoder = family.decoders[setting.decoder]
        self.names, self.generate = decoder.options_class.names(), decoder.generate
        self.call = {**other_models(family, setting.decoder, models), **setting.options, **more}

    def __call__(self, model, prompts, **flat) -> Output:
        """``flat`` as far as the decoder has such options."""
        return self.generate(model, prompts, **{k: v for k, v in flat.items() if k in self.names} | self.call)


def measure_decodes(models: dict, family: Family, times: dict, args) -> list[dict]:
    """Unverified decoding (or the baseline), speculation, and what they are compared with, at every batch size."""
    model = models[family.first]
    plain = TimedDecoder(family, family.plain or family.baseline, models)
    rule = {"accept_rule": scripted(args.accept)} if args.accept is not None else {}
    speculative = TimedDecoder(family, family.exact, models, **rule)
    label = f"{family.method}, {args.accept} accepted by script" if rule else family.method
    decodes = []
    for rows in args.batch:
        decodes.append(measure_decode("plain" if family.plain else "baseline", plain, models, rows, args, times))
        decodes.append(measure_decode(label, speculative, models, rows, args, times))
    if args.vs:
        decodes.append(against(args.vs, args.vs_kwargs, model, args))
        print(f"ratio: {decodes[1]['tokens_per_second'] / decodes[-1]['tokens_per_second']:.2f} x")
    if args.profile:
        profile(speculative, model, args, args.profile)
    return decodes


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    check(args)
    family = family_of(args.family, args.shape, args.model)
    models = load(args, family)
    model = models[family.first]
    machine = Machine.measure(model.device, model.dtype)
    print(
        f"{machine.name}: reads {machine.read / 1e12:.2f} TB/s, "
        f"{str(model.dtype)[6:]} products {machine.rate / 1e12:.1f} TFLOP/s"
    )
    lines, times, captured = [], {}, 0.0
    for role in family.timed:
        engine, table, seconds = measure_forwards(models[role], family, role, machine, args)
        lines, times, captured = lines + table.rows, times | seconds, captured + engine.capture_seconds
    result = {
        "model": args.shape or str(args.model or "tiny"),
        "machine": machine.to_json(),
        "torch": torch.__version__,
        "dtype": str(model.dtype)[6:],
        "block_length": args.block_length,
        "context": args.context,
        "accept": args.accept,
        "capture_seconds": round(captured, 2),
        "forwards": lines,
        "decodes": measure_decodes(models, family, times, args) if args.decodes else [],
    }
    if args.json:
        write_whole(args.json, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
