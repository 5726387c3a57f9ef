"""How far the fast SDAR forward is from the time needed to read its weights once, and which tile sizes get it there.

Random weights of the 8B shape; every time is the median of graph replays, and a chain runs over all layers, so that no
weight is read from a cache.

    python benchmarks/forward_study.py                      # everything: about two minutes on an H200
    python benchmarks/forward_study.py --only forward       # whole forwards against their floors

Sections: ``exact`` (log-probabilities of the fast and the plain forward against float32), ``products`` (narrow products
by tile size, and cuBLAS), ``attention`` (by tile size), ``overlap`` (early launches and prefetch), ``forward`` (whole
forwards), ``breakdown`` (their kernels).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from multiprocessing import get_context

import torch
import torch.nn.functional as F

from sdar import SDARConfig, SDARForCausalLM
from sdar.fast import FastSDAR
from shared import triton_ops as ops
from shared.masks import block_causal, two_copy_verify

HIDDEN, INNER, VOCAB, HEADS = 4096, 12288, 151936, ops.Heads(32, 8, 128)
READ_BYTES_PER_SECOND = 4.10e12
KINDS = {
    "qkv": (HEADS.width, HIDDEN), "out": (HIDDEN, HIDDEN), "gate_up": (INNER, HIDDEN), "down": (HIDDEN, INNER),
    "head": (VOCAB, HIDDEN),
}  # fmt: skip
SECTIONS = ["exact", "products", "attention", "overlap", "forward", "breakdown"]
ROWS = []


def report(section: str, what: str, milliseconds: float, floor: float | None = None, **more) -> None:
    ROWS.append({"section": section, "what": what, "ms": milliseconds, "floor": floor} | more)
    ratio = f"  floor {floor:8.4f}  x{milliseconds / floor:5.2f}" if floor else ""
    print(f"{section:10} {what:78} {milliseconds:9.4f} ms{ratio} {more or ''}", flush=True)


@contextmanager
def surviving(what: str):
    """One failing variant does not lose the rest."""
    try:
        yield
    except Exception as error:
        print(f"FAILED {what}: {type(error).__name__}: {str(error)[:300]}", flush=True)


def median_ms(run, replays: int = 15) -> float:
    """Median device time of one replay of ``run``, captured as a graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for start, end in marks:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks)


def build_model(layers: int) -> SDARForCausalLM:
    config = SDARConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers, num_key_value_heads=8, rope_theta=1e6,
        max_position_embeddings=32768,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = SDARForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.normal_(1.0, 0.1)
        elif "embed" in name:
            weight.normal_(0.0, 1.0)
    return model


# Compiling ahead, in parallel: a tiny launch with the same specialisation fills the compiler's cache.


def warm_product(kind: str, tokens: int, plan: ops.Plan, overlap: bool, parts: int) -> None:
    gated = kind == "gate_up"
    width = plan.block_k * plan.split * max(1, plan.prefetch // 64)
    x = torch.zeros(tokens, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.zeros(128 * (2 if gated else 1), width, device="cuda", dtype=torch.bfloat16)
    run_product(kind, x, weight, tokens, plan, overlap, parts, n_out=128)


def run_product(kind, x, weight, tokens, plan, overlap, parts, n_out=None, out=None, work=None):
    n_out = n_out or KINDS[kind][0]
    work = work or ops.Workspace("cuda")
    work.square_parts = parts
    out = torch.zeros(tokens, n_out, device="cuda", dtype=x.dtype) if out is None else out
    options = {"overlap": overlap, "gated": kind == "gate_up"}
    if kind in ("out", "down"):
        options["residual"] = ops.Norm(weight.new_ones(n_out), torch.empty_like(out))
    else:
        options["scale_eps"] = 1e-6
    return ops.narrow_matmul(x, weight, out, plan, work, **options)


def warm_attention(batch: int, tokens: int, plan: ops.SplitPlan, overlap: bool) -> None:
    caches = torch.zeros(2, batch, 8, 64, 128, device="cuda", dtype=torch.bfloat16)
    run_attention(caches, 0, batch, tokens, plan, overlap)


def attention_inputs(batch: int, tokens: int, length: int):
    cos = torch.rand(8192, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(128, device="cuda", dtype=torch.bfloat16)
    positions = (length + torch.arange(tokens, device="cuda")).expand(batch, -1).contiguous()
    qkv = torch.randn(batch * tokens, HEADS.width, device="cuda", dtype=torch.bfloat16)
    lengths = torch.full((batch,), length, device="cuda")
    return qkv, positions, lengths, torch.arange(batch, device="cuda"), ops.QKNorm(weight, weight, cos, cos, 1e-6)


def run_attention(caches, length, batch, tokens, plan, overlap, inputs=None, mask=None):
    """One launch for each layer of ``caches [2 * layers, B, H_kv, S, D]``."""
    qkv, positions, lengths, rows, norm = inputs or attention_inputs(batch, tokens, length)
    mask = torch.ones(tokens, tokens, device="cuda", dtype=torch.bool) if mask is None else mask
    for i in range(0, len(caches), 2):
        place = ops.Place(caches[i], caches[i + 1], lengths, rows)
        ops.attend_split(qkv, positions, place, HEADS, norm, mask, plan=plan, overlap=overlap)


def layer_weights(layer) -> dict:
    return {"qkv": layer.qkv, "out": layer.out, "gate_up": layer.gate_up, "down": layer.down}


def forward_jobs(fast: FastSDAR, tokens: int) -> list:
    """What a narrow forward over ``tokens`` tokens compiles."""
    weights = layer_weights(fast.layers[0]) | {"head": fast.model.lm_head.weight}
    plans = {kind: fast.plan(tokens, weight, gated=kind == "gate_up") for kind, weight in weights.items()}
    down, out = (-(-HIDDEN // plans[kind].block_n) for kind in ("down", "out"))
    parts = [("qkv", 1), ("qkv", down), ("gate_up", out), ("out", 1), ("down", 1), ("head", down)]
    return [partial(warm_product, kind, tokens, plans[kind], fast.overlap, count) for kind, count in parts]


def compile_ahead(jobs: list) -> None:
    started = time.time()
    for job, future in [(job, compilers().submit(job)) for job in jobs]:
        with surviving(f"compiling {job}"):
            future.result()
    print(f"compiled {len(jobs)} jobs in {time.time() - started:.0f} s", flush=True)


@lru_cache(maxsize=1)
def compilers(workers: int = 14) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


# Sections


def product_plans(kind: str) -> list[ops.Plan]:
    """The chosen tiles and their nearest rivals."""
    P = ops.Plan
    return {
        "qkv": [P(64, 128, 4, 3), P(64, 128, 1, 6), P(64, 256, 1, 3), P(32, 128, 1, 8), P(128, 128, 2, 4, 8)],
        "out": [P(64, 128, 2, 6), P(64, 256, 2, 4), P(64, 128, 4, 4), P(32, 128, 1, 8)],
        "gate_up": [P(32, 128, 1, 4), P(64, 128, 1, 3), P(64, 64, 1, 4), P(32, 64, 1, 7)],
        "down": [P(64, 128, 2, 6), P(64, 256, 2, 4), P(64, 128, 4, 4), P(32, 256, 1, 6)],
        "head": [P(128, 128, 1, 3, 8), P(128, 128, 1, 4, 8), P(64, 128, 1, 4), P(128, 64, 1, 5, 8)],
    }[kind]


def study_products(fast: FastSDAR, counts: list[int]) -> None:
    """Times of one launch, in a chain over all layers."""
    jobs = [
        partial(warm_product, kind, tokens, plan, True, 128)
        for kind in KINDS
        for tokens in counts
        for plan in product_plans(kind)
    ]
    compile_ahead(jobs)
    by_layer = [layer_weights(layer) for layer in fast.layers]
    weights = {kind: [layer[kind] for layer in by_layer] for kind in by_layer[0]}
    weights["head"] = [fast.model.lm_head.weight] * 3
    for tokens in counts:
        for kind, stack in weights.items():
            depth, floor = stack[0].shape[1], stack[0].nbytes / READ_BYTES_PER_SECOND * 1e3
            x = torch.randn(tokens, depth, device="cuda", dtype=torch.bfloat16)
            out = torch.zeros(tokens, KINDS[kind][0], device="cuda", dtype=torch.bfloat16)
            work = ops.Workspace("cuda")
            work.squares.fill_(float(depth) / 128)

            def library(stack=stack, x=x):
                for weight in stack:
                    F.linear(x, weight)

            with surviving(f"cublas {kind}"):
                report("products", f"T{tokens} {kind} cuBLAS alone", median_ms(library) / len(stack), floor)
            for plan in product_plans(kind):

                def ours(stack=stack, x=x, plan=plan, kind=kind, out=out, work=work):
                    for weight in stack:
                        run_product(kind, x, weight, x.shape[0], plan, True, 128, out=out, work=work)

                with surviving(f"{kind} {plan}"):
                    short = f"n{plan.block_n} k{plan.block_k} split{plan.split} st{plan.stages} w{plan.warps}"
                    report("products", f"T{tokens} {kind} {short}", median_ms(ours) / len(stack), floor)


def attention_cases():
    S = ops.SplitPlan
    yield 1, 16, 512, [S(64, 64, 16, 4, 3), S(64, 64, 8), S(16, 64, 16), S(16, 128, 4), S(64, 64, 8, 8)]
    yield 1, 32, 512, [S(64, 64, 8, 4, 3), S(64, 64, 16, 4, 3), S(16, 64, 8), S(64, 64, 8, 8)]
    yield 1, 16, 4096, [S(64, 64, 32, 4, 3), S(64, 64, 16, 4, 3), S(32, 64, 16, 4, 3), S(16, 64, 8, 4, 3)]
    yield 1, 32, 4096, [S(64, 64, 16, 4, 3), S(64, 64, 8, 4, 3), S(64, 64, 16, 8, 3)]
    yield 8, 16, 512, [S(64, 64, n, 4, 3) for n in (2, 1, 4)]
    yield 32, 16, 512, [S(64, 64, 1, 4, 3), S(64, 64, 1, 4, 2), S(64, 64, 2, 4, 3)]


def study_attention(layers: int) -> None:
    cases = [(b, t, n, plan) for b, t, n, plans in attention_cases() for plan in plans]
    compile_ahead([partial(warm_attention, b, t, plan, True) for b, t, _, plan in cases])
    for (b, t, n), group in itertools.groupby(cases, key=lambda c: c[:3]):
        caches = torch.randn(2 * layers, b, 8, n + 64, 128, device="cuda", dtype=torch.bfloat16)
        floor = 2 * b * 8 * (n + t) * 128 * 2 / READ_BYTES_PER_SECOND * 1e3
        inputs = attention_inputs(b, t, n)
        mask = torch.ones(t, t, device="cuda", dtype=torch.bool)
        for plan in [c[3] for c in group]:
            with surviving(f"attention {b} {t} {n} {plan}"):
                ms = median_ms(partial(run_attention, caches, n, b, t, plan, True, inputs, mask))
                short = f"m{plan.block_m} s{plan.block_s} x{plan.splits} w{plan.warps} st{plan.stages}"
                report("attention", f"b{b} T{t} context {n} {short}", ms / layers, floor)


def filled_cache(fast: FastSDAR, rows: int, length: int, slots: int):
    cache = fast.model.new_cache(rows, slots)
    cache.keys.normal_()
    cache.values.normal_()
    cache.commit([length] * rows)
    return cache


def weight_bytes(model: SDARForCausalLM) -> int:
    return sum(w.nbytes for n, w in model.named_parameters() if "embed" not in n)


def matrix_rate() -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / (median_ms(lambda: a @ b) * 1e-3)


def forward_floor(model, rate: float, batch: int, tokens: int, length: int, logits: int) -> float:
    """Milliseconds: weights and cache read once, or the operations at the measured matrix rate, whichever is longer."""
    head = model.lm_head.weight.numel()
    body = weight_bytes(model) // 2 - head
    kv = 2 * model.config.num_hidden_layers * batch * 8 * (length + tokens) * 128 * 2
    pairs = batch * tokens * (length + tokens / 2 if tokens > 64 else length + tokens)
    operations = 2 * batch * (tokens * body + logits * head) + 4 * pairs * 4096 * model.config.num_hidden_layers
    return max((2 * body + (2 * head if logits else 0) + kv) / READ_BYTES_PER_SECOND, operations / rate) * 1e3


def time_forward(fast, batch, tokens, length, slots, mask=None, logits_at=None) -> float:
    cache = filled_cache(fast, batch, length, slots)
    ids = torch.randint(VOCAB, (batch, tokens), device="cuda")
    positions = (length + torch.arange(tokens, device="cuda")).expand(batch, -1).contiguous()
    rows = torch.arange(batch, device="cuda")
    return median_ms(
        lambda: fast(ids, positions, cache, rows, mask, logits_at=logits_at, slots=slots), 9 if tokens > 64 else 21
    )


def study_overlap(fast: FastSDAR, rate: float) -> None:
    """Early launches, and how much of its weights a product asks for before its turn."""
    kept = fast.plan, fast.overlap

    def ahead(count: int):
        return lambda *args, **kwargs: replace(kept[0](*args, **kwargs), prefetch=count)

    variants = [(0, False)] + [(count, True) for count in (0, 64, 128, 256)]
    jobs = []
    for tokens, (count, overlap) in itertools.product((16, 32), variants):
        fast.plan, fast.overlap = ahead(count), overlap
        jobs += forward_jobs(fast, tokens)
        jobs.append(partial(warm_attention, 1, tokens, ops.split_plan(1, tokens, HEADS, 1024), overlap))
    compile_ahead(jobs)
    for tokens in (16, 32):
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device="cuda")
        floor = forward_floor(fast.model, rate, 1, tokens, 512, tokens)
        for count, overlap in variants:
            fast.plan, fast.overlap = ahead(count), overlap
            with surviving(f"prefetch {count}"):
                name = f"T{tokens} {'early launch' if overlap else 'no early launch'}, prefetch {count}"
                report("overlap", name, time_forward(fast, 1, tokens, 512, 1024, mask), floor)
    fast.plan, fast.overlap = kept


def study_exact(fast: FastSDAR) -> None:
    """Log-probabilities of both bfloat16 forwards against a float32 one."""
    model = fast.model
    exact = copy.deepcopy(model).float()
    for tokens, length, name in [(16, 512, "draft"), (32, 512, "verify"), (2048, 0, "prefill")]:
        ids = torch.randint(VOCAB, (1, tokens), device="cuda")
        positions = (length + torch.arange(tokens, device="cuda"))[None]
        mask = {"draft": None, "verify": two_copy_verify(16, "cuda"), "prefill": block_causal(tokens, 16, "cuda")}[name]
        cache = filled_cache(fast, 1, length, 2560)
        wide = exact.new_cache(1, 2560)
        wide.keys.copy_(cache.keys)
        wide.values.copy_(cache.values)
        wide.commit([length])
        with torch.inference_mode():
            want = exact(ids, positions, wide.window(tokens), mask).log_softmax(-1)
            plain = model(ids, positions, cache.window(tokens), mask).float().log_softmax(-1)
            ours = fast(ids, positions, cache, None, mask).float().log_softmax(-1)
        for who, got in [("plain", plain), ("fast", ours)]:
            same = float((got.argmax(-1) == want.argmax(-1)).float().mean())
            error = float((got - want).abs().max()), float((got - want).norm() / want.norm())
            print(
                f"exact      {name:8} {who:6} max {error[0]:.4f} relative {error[1]:.2e} same argmax {same:.4f}",
                flush=True,
            )
        del want, plain, ours
    del exact
    torch.cuda.empty_cache()


def study_forward(fast: FastSDAR, rate: float) -> None:
    model, cuda = fast.model, "cuda"
    batches = [(1, 16), (1, 32), (1, 64), (4, 16), (8, 16), (32, 16), (32, 32)]
    jobs = [job for n in (16, 32) for job in forward_jobs(fast, n)]
    jobs += [
        partial(warm_attention, b, t, ops.split_plan(b, t, HEADS, slots), fast.overlap)
        for b, t in batches
        for slots in (1024, 5120)
    ]
    compile_ahead(jobs)
    verify = two_copy_verify(16, cuda)
    half = torch.arange(16, 32, device=cuda)[None]
    cases = [
        ("draft 16 tokens", 1, 16, None, None), ("verify 32 tokens, 16 logits", 1, 32, verify, half),
        ("commit and draft 32 tokens", 1, 32, None, None), ("draft 64 tokens", 1, 64, None, None),
        ("draft 4 x 16 tokens", 4, 16, None, None), ("draft 8 x 16 tokens", 8, 16, None, None),
        ("draft 32 x 16 tokens", 32, 16, None, None),
        ("verify 32 x 32 tokens, 16 logits", 32, 32, verify, half.expand(32, -1)),
    ]  # fmt: skip
    for name, batch, tokens, mask, at in cases:
        for length, slots in [(512, 1024), (4096, 5120)]:
            if batch * length > 32 * 512:
                continue
            with surviving(name):
                mask = torch.ones(tokens, tokens, dtype=torch.bool, device=cuda) if mask is None else mask
                at = None if at is None else at.contiguous()
                ms = time_forward(fast, batch, tokens, length, slots, mask, at)
                floor = forward_floor(model, rate, batch, tokens, length, tokens if at is None else 16)
                report("forward", f"{name}, context {length}", ms, floor)
    with surviving("allocation"):
        report("forward", "draft 16 tokens, context 512, 32768 slots", time_forward(fast, 1, 16, 512, 32768))
    for name, mask in [("block-causal", block_causal(2048, 16, cuda)), ("all see all", None)]:
        with surviving(f"prefill {name}"):
            ms = time_forward(fast, 1, 2048, 0, 2048, mask, torch.tensor([[2047]], device=cuda))
            report("forward", f"prefill 2048 tokens, {name}", ms, forward_floor(model, rate, 1, 2048, 0, 1))


def study_breakdown(fast: FastSDAR) -> None:
    """Device time of each kernel of one forward, added up over layers; without early launches, so that none waits."""
    kept, fast.overlap = fast.overlap, False
    for batch, tokens in [(1, 16), (1, 32), (8, 16), (32, 16), (1, 2048)]:
        length = 0 if tokens == 2048 else 512
        cache = filled_cache(fast, batch, length, length + tokens)
        ids = torch.randint(VOCAB, (batch, tokens), device="cuda")
        positions = torch.arange(tokens, device="cuda").expand(batch, -1).contiguous()
        mask = block_causal(tokens, 16, "cuda")
        with surviving(f"breakdown {batch} x {tokens}"):
            for _ in range(2):
                fast(ids, positions, cache, None, mask, slots=1024, logits_at=slice(-16, None))
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                fast(ids, positions, cache, None, mask, slots=1024, logits_at=slice(-16, None))
                torch.cuda.synchronize()
            for row in sorted(profile.key_averages(), key=lambda r: -r.device_time_total)[:9]:
                report("breakdown", f"{batch} x {tokens}: {row.count:4d} x {row.key[:56]}", row.device_time_total / 1e3)
    fast.overlap = kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=SECTIONS, choices=SECTIONS)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--counts", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--json", help="also write every row to this file")
    arguments = parser.parse_args()
    started = time.time()
    compilers()
    fast = FastSDAR(build_model(arguments.layers))
    rate = matrix_rate()
    print(f"model in {time.time() - started:.0f} s, matrix rate {rate / 1e12:.0f} TFLOP/s", flush=True)
    if "exact" in arguments.only:
        with surviving("exact"):
            study_exact(fast)
    if "products" in arguments.only:
        study_products(fast, arguments.counts)
    if "attention" in arguments.only:
        study_attention(arguments.layers)
    if "overlap" in arguments.only:
        study_overlap(fast, rate)
    if "forward" in arguments.only:
        study_forward(fast, rate)
    if "breakdown" in arguments.only:
        study_breakdown(fast)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(ROWS, file, indent=1)
    print(f"total {time.time() - started:.0f} s")
    compilers().shutdown()


if __name__ == "__main__":
    main()
