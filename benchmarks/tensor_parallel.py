"""What a forward costs when several GPUs hold one model, against one GPU and against the time to read the weights once.

Random bfloat16 weights of the given shape, built on the devices. Times are medians; "eager" is launched from Python, "graph" is a CUDA graph
of the same plain forward, all-reduces included. The floor of a forward is the bytes a process reads (weights, head, keys and values) over
the read bandwidth measured here. A small recorded model is also decoded in float32 by one and by all processes: the tokens must be equal.

    torchrun --nproc_per_node=2 benchmarks/tensor_parallel.py --shape sdar-8b
    torchrun --nproc_per_node=2 benchmarks/tensor_parallel.py --shape tiny --device cpu     # the same steps in seconds

Prints a line a measurement and one JSON line last. A measurement that fails says so and is null.
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.errors import end_on_interrupt

    end_on_interrupt()

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sdar import generate, generate_ssd_policy
from sdar.configuration_sdar import SDARConfig
from sdar.modeling_sdar import SDARForCausalLM
from shared.errors import Parser, run_main
from shared.network.loading import resolve_device
from shared.scripts import tensor_parallel
from shared.scripts.distributed import World
from shared.scripts.tensor_parallel import Group

RECORDED = Path(__file__).parents[1] / "tests" / "golden" / "SDAR" / "model"
SHAPES = {
    "sdar-8b": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rope_theta": 1e6,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256,
    },
}  # fmt: skip
DECODES = {
    "plain": (generate, {"temperature": 0.0}),
    "exact, sampled": (
        generate_ssd_policy,
        {"acceptance": "exact", "cache_ver": True, "do_verify_policy": "always", "temperature": 1.0},
    ),
}


class Report:
    """Rows of measurements; rank 0 prints."""

    def __init__(self, group: Group):
        self.group, self.rows = group, {}

    def say(self, text: str) -> None:
        if self.group.rank == 0:
            print(text, flush=True)

    def measure(self, name: str, work: Callable[[], object]) -> object:
        """``work()``, or None if it failed in any process: then all forget it, so that they stay together."""
        value, failure = None, None
        try:
            value = work()
        except Exception as error:
            failure = f"rank {self.group.rank}: {type(error).__name__}: {str(error)[:300]}"
        failures: list[str | None] = [None] * self.group.size
        dist.all_gather_object(failures, failure)
        failures = [f for f in failures if f]
        value = None if failures else value
        self.say(f"{name:48} {'FAILED ' + '; '.join(failures) if failures else value}")
        self.rows[name] = value
        return value


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int, inner: int = 1) -> float:
    """Median time of one of ``inner`` calls in a row, the device waited for; three calls go first to warm up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(inner):
            call()
        synchronize(device)
        times.append((time.perf_counter() - began) / inner * 1e3)
    return round(statistics.median(times), 4)


def bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes a second: the best of a reduction (read) and a copy (read and write) of a tensor far larger than any cache."""
    x = torch.zeros(2**30 if device.type == "cuda" else 2**22, device=device)
    y = torch.empty_like(x)
    read = x.nbytes / milliseconds(x.sum, device, repeats)
    return round(max(read, 2 * x.nbytes / milliseconds(lambda: y.copy_(x), device, repeats)) * 1e3)


@torch.no_grad()
def random_model(config: SDARConfig, group: Group, dtype: torch.dtype) -> SDARForCausalLM:
    """This process's part of a model of random weights (the whole of it in a group of one)."""
    model = tensor_parallel.skeleton(SDARForCausalLM, config, group).to(dtype).to_empty(device=group.device)
    for name, weight in model.named_parameters():
        # What every process has whole must be the same everywhere.
        whole = "norm" in name or "embed" in name
        source = torch.Generator(group.device).manual_seed(0 if whole else 1 + group.rank)
        weight.fill_(1.0) if "norm" in name else weight.normal_(0, 0.02, generator=source)
    return tensor_parallel.connect(model, group) if group.size > 1 else model.eval().requires_grad_(False)


def forward_bytes(model: SDARForCausalLM, context: int, tokens: int) -> int:
    """Bytes one forward has to read in this process; of the embedding only the rows looked up."""
    weights = sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name)
    c = model.config
    cached = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * (context + tokens)
    return weights + (cached + tokens * c.hidden_size) * model.dtype.itemsize


class Forward:
    """A plain forward of ``tokens`` tokens after ``context`` cached ones, again and again at the same place."""

    def __init__(self, model: SDARForCausalLM, tokens: int, context: int):
        self.model, device = model, model.device
        cache = model.new_cache(1, context + tokens)
        cache.commit([context])
        self.window = cache.window(tokens)
        self.ids = torch.arange(tokens, device=device)[None] % model.config.vocab_size
        self.positions = context + torch.arange(tokens, device=device)[None]

    def __call__(self) -> Tensor:
        return self.model(self.ids, self.positions, self.window)

    def captured(self) -> Callable[[], None]:
        """The same as a CUDA graph, checked against the eager logits."""
        want = self().clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        time.sleep(1)  # NCCL's watchdog must have seen the eager all-reduces end: it may not ask during the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = self()
        graph.replay()
        error = (logits.float() - want.float()).abs().max() / want.float().abs().max()
        if not error < 0.02:
            raise AssertionError(f"the graph's logits are off by {error:.3g}")
        return graph.replay


def time_eager(report: Report, label: str, model, arguments, rate: float | None) -> None:
    """Eager times of each token count, and their floor."""
    for tokens in arguments.tokens:
        if rate:
            floor = round(forward_bytes(model, arguments.context, tokens) / rate * 1e3, 4)
            report.measure(f"{label}, {tokens} tokens, floor ms", lambda floor=floor: floor)
        forward = Forward(model, tokens, arguments.context)
        work = partial(milliseconds, forward, model.device, arguments.repeats)
        report.measure(f"{label}, {tokens} tokens, eager ms", work)


def time_graphs(report: Report, label: str, model, arguments) -> None:
    """Times of the same forwards as CUDA graphs."""

    def work(tokens: int) -> float:
        return milliseconds(Forward(model, tokens, arguments.context).captured(), model.device, arguments.repeats)

    for tokens in arguments.tokens:
        report.measure(f"{label}, {tokens} tokens, graph ms", partial(work, tokens))


def time_sum(report: Report, group: Group, arguments, config: SDARConfig, dtype: torch.dtype) -> None:
    """One all-reduce of a layer's half, timed in a row of as many as a forward has."""
    for tokens in arguments.tokens:
        x = torch.zeros(tokens, config.hidden_size, device=group.device, dtype=dtype)
        count = 2 * config.num_hidden_layers
        work = partial(milliseconds, partial(group.sum, x), group.device, arguments.repeats, count)
        report.measure(f"all-reduce of {tokens} tokens, eager ms", work)


def same_bits(group: Group, model: SDARForCausalLM, arguments) -> bool:
    """Are sums (of the forward's sizes) and logits equal bit for bit in all processes?"""
    agree = True
    for tokens in arguments.tokens:
        source = torch.Generator(group.device).manual_seed(group.rank)
        x = torch.randn(tokens, model.config.hidden_size, device=group.device, generator=source).to(model.dtype)
        agree &= group.agree(group.sum(x)) and group.agree(Forward(model, tokens, arguments.context)())
    return agree


def same_tokens(group: Group) -> dict[str, int]:
    """Decode the recorded model in float32 alone and together; the number of (equal) tokens of each decoder."""
    alone = SDARForCausalLM.from_pretrained(RECORDED, dtype="float32", device=group.device)
    together = tensor_parallel.shard(SDARForCausalLM, RECORDED, group, dtype="float32")
    prompts, counts = [[5, 17, 99, 3, 42, 7, 7, 1, 200], [11, 12], list(range(150, 171))], {}
    for name, (module, flat) in DECODES.items():
        flat = {"block_length": 8, "max_new_tokens": 32, "seed": 1, "fast": False} | flat
        one, all_of_them = (module.block_diffusion_generate(m, prompts, **flat) for m in (alone, together))
        if one.tokens != all_of_them.tokens:
            raise AssertionError(f"{name}: {group.size} processes decode {all_of_them.tokens}, one {one.tokens}")
        counts[name] = one.token_count
    return counts


def empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def study_model(report: Report, label: str, group: Group, arguments, rate: float | None) -> None:
    """Build one model, time it, let it go. Graphs come last: a failed capture can spoil what follows."""
    cuda = group.device.type == "cuda"
    model = random_model(SDARConfig(**SHAPES[arguments.shape]), group, torch.bfloat16 if cuda else torch.float32)
    report.measure(f"{label}, bytes of weights a process", lambda: sum(p.nbytes for p in model.parameters()))
    time_eager(report, label, model, arguments, rate)
    if group.size > 1:
        report.measure("same bits in all processes", lambda: same_bits(group, model, arguments))
    if cuda:
        time_graphs(report, label, model, arguments)


@torch.inference_mode()
def study(report: Report, group: Group, arguments) -> None:
    """Every measurement; one model is in memory at a time."""
    config, device = SDARConfig(**SHAPES[arguments.shape]), group.device
    rate = report.measure("read bandwidth, bytes/s", lambda: bandwidth(device, arguments.repeats))
    empty_cache(device)
    report.measure("tokens decoded equally", lambda: same_tokens(group))
    time_sum(report, group, arguments, config, torch.bfloat16 if device.type == "cuda" else torch.float32)
    study_model(report, "1 process", Group(0, 1, device), arguments, rate)
    empty_cache(device)
    study_model(report, f"{group.size} processes", group, arguments, rate)
    empty_cache(device)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="sdar-8b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    world = World.from_environment()
    if world.size < 2:
        parser.error("start it with torchrun --nproc_per_node=2")
    world = World.from_environment(world.size)
    group = tensor_parallel.join(world, resolve_device(world.device(arguments.device)), timedelta(minutes=2))
    report = Report(group)
    try:
        study(report, group, arguments)
    finally:
        device = torch.cuda.get_device_name() if group.device.type == "cuda" else "cpu"
        facts = {"shape": arguments.shape, "processes": group.size, "device": device, "context": arguments.context}
        report.say(json.dumps(facts | {"torch": torch.__version__} | report.rows))
    world.leave()


if __name__ == "__main__":
    run_main(main)
