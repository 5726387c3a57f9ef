"""Speed of a family's forwards and decoders, next to what the machine allows.

python -m eval.benchmark                                    # the shipped checkpoint, on what is here
python -m eval.benchmark --shape sdar-8b --accept 5         # random weights of a named shape, acceptance by a script
python -m eval.benchmark --shape sdar-8b --vs mymodule:generate --vs-kwargs '{"block_length": 16}'

Measures read bandwidth and matrix rate first, then milliseconds per forward by kind and size, then whole decodes. The floor of a forward is what its bytes or its
operations take at those rates (`eval.roofline`); "outside" is the time of a decoding step that is not spent in its forwards. Random weights accept
nothing, so `--accept N` keeps the first N tokens of every verified span whatever the verifier says; the acceptance rule still runs. A table for people,
then one JSON line, always last.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import sdar
from eval.roofline import Machine, dense_work, timed
from sdar import SDARConfig, SDARForCausalLM, generate, generate_ssd_policy
from shared import masks
from shared.engine import Engine
from shared.errors import UserError, run_main
from shared.hf_style import HFStyle
from shared.loading import resolve_device, resolve_dtype
from shared.options import Runtime
from shared.output import Output
from shared.verify import Verdict, judge

_QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "rope_theta": 1e6, "mask_token_id": 151669}
SHAPES = {
    "sdar-1.7b": {**_QWEN3, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "sdar-4b": {**_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "sdar-8b": {**_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}  # fmt: skip


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> SDARForCausalLM:
    """Random weights of a named shape, made on the device."""
    with torch.device("meta"):
        model = SDARForCausalLM(SDARConfig(**SHAPES[shape], max_position_embeddings=32768, eos_token_id=151643))
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.fill_(1.0)
        else:
            weight.normal_(std=0.02)
    return model


def scripted(accept: int) -> Callable[..., Verdict]:
    """An acceptance rule that runs the real one and then keeps the first ``accept`` tokens of the span, replacing the next."""

    def rule(draft, logits: Tensor, *rest) -> Verdict:
        real = judge(draft, logits, *rest)
        place = draft.span.cumsum(-1)
        accepted, rejected = draft.span & (place <= accept), draft.span & (place == accept + 1)
        return Verdict(accepted, rejected, draft.tokens, real.ratio, real.finite)

    return rule


class Forwards:
    """Times single forwards of an engine whose rows all hold ``context`` tokens."""

    def __init__(self, model, machine: Machine, engine: Engine, length: int, context: int):
        self.model, self.machine, self.engine = model, machine, engine
        self.length, self.context = length, context
        self.rows: list[dict] = []

    def measure(self, name: str, rows: int, *, tokens: int, mask, queries: int = 0, riders: bool = False) -> float:
        """Milliseconds of one kind of forward at batch ``rows``; adds a line to the table."""
        cache, device = self.engine.cache, self.model.device
        cache.reset(range(len(cache.lengths)))
        cache.commit([self.context] * rows, range(rows))
        index = list(range(rows)) * (2 if riders else 1)
        ahead = [tokens] * rows + [0] * rows if riders else None
        window = cache.window(tokens, index, ahead=ahead)
        inputs = [torch.randint(vocabulary(self.model), (len(index), tokens), device=device) for _ in range(8)]
        positions = (window.prefix[:, None] + torch.arange(tokens, device=device)).clamp(
            max=self.model.config.max_position_embeddings - 1
        )
        at, turn = slice(tokens - queries, None) if queries else None, iter(range(1 << 30))
        local = None if mask is None else mask.expand(len(index), -1, -1)
        call = lambda: self.engine.forward(  # noqa: E731
            inputs[next(turn) % 8], positions, window, local, leading=rows, logits_at=at
        )
        seconds = timed(call, device)
        logits = rows * (queries or tokens)
        work = dense_work(self.model, entries=len(index), tokens=tokens, logits=logits, context=self.context)
        self.add(f"{name}, {rows} x {tokens} tokens" + (" twice" if riders else ""), seconds, work.floor(self.machine))
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
        work = dense_work(self.model, entries=1, tokens=tokens, logits=0, context=0, causal=True)
        self.add(f"prefill, {tokens} tokens", seconds, work.floor(self.machine))
        self.rows[-1]["share_of_matrix_rate"] = round(work.operations / seconds / self.machine.rate, 3)

    def add(self, name: str, seconds: float, floor: float) -> None:
        ms, least = 1e3 * seconds, 1e3 * floor
        self.rows.append(
            {"forward": name, "ms": round(ms, 3), "floor_ms": round(least, 3), "over_floor": round(ms / least, 2)}
        )
        print(f"{name:48s} {ms:9.3f} ms   floor {least:8.3f}   {ms / least:5.2f} x", flush=True)


def vocabulary(model) -> int:
    """Random inputs are ids below this: ordinary tokens of every vocabulary here, which keep their special ids at the end."""
    return min(1000, model.special_ids()[0])


def prompts_of(model, rows: int, context: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(vocabulary(model)) for _ in range(context)] for _ in range(rows)]


def measure_decode(
    name: str, decode: Callable[..., Output], model, rows: int, args, draft: float, verify: float, **flat
) -> dict:
    """One decode of ``rows`` prompts at once, after one to warm up. ``draft`` and ``verify`` are seconds of those forwards at this batch size."""
    prompts = prompts_of(model, rows, args.context)
    call = {"block_length": args.block_length, "max_new_tokens": args.new_tokens, "stopping_criteria_idx": (), **flat}
    runtime = {"fast": args.fast, "graphs": args.graphs}
    decode(model, prompts, **{**call, "max_new_tokens": 2 * args.block_length, **runtime})
    if model.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    output = decode(model, prompts, **call, **runtime)
    spent, steps = output.batch_forwards, output.batch_forwards["draft"]
    forwards = sum(spent.values()) - spent.get("prefill", 0)
    inside = (steps + spent.get("commit", 0)) * draft + spent.get("verify", 0) * verify
    decoding = output.seconds - output.prefill_seconds
    line = {
        "decode": name,
        "rows": rows,
        "tokens_per_second": round(output.tokens_per_second, 1),
        "forwards_per_token": round(output.forwards_per_token, 4),
        "ms_per_forward_in_loop": round(1e3 * decoding / forwards, 3),
        "ms_per_step_outside_forwards": round(1e3 * (decoding - inside) / steps, 3),
        "prefill_ms": round(1e3 * output.prefill_seconds, 2),
        "batch_forwards": spent,
    }
    if model.device.type == "cuda":
        held = sum(p.nbytes for p in {p.data_ptr(): p for p in model.parameters()}.values())
        engine = getattr(model, "last_engine", None)
        cache = engine.cache.nbytes if engine else 0
        line["peak_memory_over_weights_and_cache"] = round(torch.cuda.max_memory_reserved() / (held + cache), 3)
    print(
        f"{name:40s} batch {rows:3d}  {line['tokens_per_second']:9.1f} tokens/s  {line['forwards_per_token']:.3f} forwards/token  "
        f"{line['ms_per_forward_in_loop']:7.3f} ms/forward  {line['ms_per_step_outside_forwards']:6.3f} ms/step outside",
        flush=True,
    )
    return line


def against(target: str, kwargs: dict, model, args) -> dict:
    """The same prompt and weights through a decoder with the published signature: ``function(model, input_ids, **kwargs)``."""
    module, _, function = target.partition(":")
    try:
        decode = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"vs {target!r} cannot be imported ({error}). Allowed: MODULE:FUNCTION") from error
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


def profile(decode: Callable[..., Output], model, args, path: str, **flat) -> None:
    """Kernel names and times of a short decode at batch 1, per decoding step, to ``path``."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    on_gpu = model.device.type == "cuda"
    call = {
        "block_length": args.block_length,
        "max_new_tokens": 4 * args.block_length,
        "stopping_criteria_idx": (),
        **flat,
    }
    with profiler(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as record:
        output = decode(model, prompts_of(model, 1, args.context), **call, fast=args.fast, graphs=args.graphs)
    steps = output.batch_forwards["draft"]
    time_of = (lambda e: e.self_device_time_total) if on_gpu else (lambda e: e.self_cpu_time_total)
    events = sorted(record.key_averages(), key=time_of, reverse=True)
    lines = [f"{steps} steps, forwards {output.batch_forwards}; microseconds and launches a step"]
    lines += [f"{time_of(e) / steps:10.1f} {e.count / steps:7.1f}  {e.key[:110]}" for e in events if time_of(e)]
    Path(path).write_text("\n".join(lines) + "\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint (default: the shipped one, unless --shape is given)")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape instead")
    parser.add_argument("--accept", type=int, help="accept this many tokens of every verified span, by script")
    parser.add_argument("--block_length", type=int, default=16)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--fast", type=lambda s: s == "true", help="true or false; default: where it can run")
    parser.add_argument("--graphs", type=lambda s: s == "true", help="true or false; default: where it can run")
    parser.add_argument("--vs", help="MODULE:FUNCTION, a decoder with the published signature, on the same weights")
    parser.add_argument("--vs-kwargs", type=json.loads, default={}, help="its keyword arguments, as JSON")
    parser.add_argument("--profile", help="write kernel names and times of one S2D2 step at batch 1 to this file")
    parser.add_argument("--json", help="also write the result to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = resolve_device(args.device)
    if args.shape:
        model = random_model(args.shape, device, resolve_dtype(args.dtype, torch.bfloat16, device))
    else:
        source = args.model or Path(sdar.__file__).parent / "tiny"
        model = SDARForCausalLM.from_pretrained(source, dtype=args.dtype, device=device)
    room = model.config.max_position_embeddings
    args.context = min(args.context, room // 2)
    args.prefill = min(args.prefill, room)
    length, most = args.block_length, max(args.batch)
    machine = Machine.measure(device, model.dtype)
    print(
        f"{machine.name}: reads {machine.read / 1e12:.2f} TB/s, {str(model.dtype)[6:]} products {machine.rate / 1e12:.1f} TFLOP/s"
    )
    runtime = Runtime(fast=args.fast, graphs=args.graphs)
    blocks = -(-(args.context + args.new_tokens) // length) * length
    slots = max(blocks + length, args.prefill)
    engine = Engine.of(model, most, slots, length, runtime)
    times, table = {}, Forwards(model, machine, engine, length, args.context)
    for rows in args.batch:
        two = masks.two_copy_verify(length, device)
        times[rows, "draft"] = table.measure("draft", rows, tokens=length, mask=None)
        times[rows, "verify"] = table.measure("verify", rows, tokens=2 * length, mask=two, queries=length)
        table.measure("draft and commit", rows, tokens=length, mask=None, riders=True)
    table.prefill(args.prefill)
    print(f"graphs: {engine.capture_seconds:.1f} s to capture {len(engine.runner.captured) if engine.runner else 0}\n")
    plain, s2d2 = generate.block_diffusion_generate, generate_ssd_policy.block_diffusion_generate
    rule = {"judge": scripted(args.accept)} if args.accept is not None else {}
    label = f"S2D2, {args.accept} accepted by script" if rule else "S2D2"
    lossless = {"do_verify_policy": "always", "acceptance": "exact", "cache_ver": True, "draft_ver": True}
    decodes = []
    for rows in args.batch:
        spent = {"draft": times[rows, "draft"], "verify": times[rows, "verify"]}
        decodes.append(measure_decode("plain", plain, model, rows, args, **spent))
        decodes.append(measure_decode(label, s2d2, model, rows, args, **spent, **lossless, **rule))
    if args.vs:
        decodes.append(against(args.vs, args.vs_kwargs, model, args))
        print(f"ratio: {decodes[1]['tokens_per_second'] / decodes[-1]['tokens_per_second']:.2f} x")
    if args.profile:
        profile(s2d2, model, args, args.profile, **lossless, **rule)
    result = {
        "model": args.shape or str(args.model or "tiny"),
        "machine": {"name": machine.name, "read_bytes_per_second": machine.read, "operations_per_second": machine.rate},
        "torch": torch.__version__,
        "dtype": str(model.dtype)[6:],
        "block_length": length,
        "context": args.context,
        "accept": args.accept,
        "capture_seconds": round(engine.capture_seconds, 2),
        "forwards": table.rows,
        "decodes": decodes,
    }
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
