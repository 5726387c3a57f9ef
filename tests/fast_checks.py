"""What every family's fast forward is held to: the plain network's logits and cache, whatever the batch, the window, the mask and the padding.

On a GPU, or in triton's interpreter with ``TRITON_INTERPRET=1``. A check takes a family's small model, made by `on_device`.
"""

from __future__ import annotations

import copy

import pytest
import torch

from shared.errors import UserError
from shared.gpu.engine import Engine
from shared.gpu.fast import FastForward, fast_forward_of
from shared.gpu.graphs import Shape
from shared.gpu.launch import available
from shared.network.features import Features
from shared.network.kv_cache import Window
from shared.network.masks import block_causal, token_causal, two_copy_verify
from shared.options import Runtime

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
VOCABULARY = 200
needs_kernels = pytest.mark.skipif(not available(DEVICE), reason="no CUDA device, and triton does not interpret")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="no CUDA device")

# (rows, tokens, mask, how the window is moved): what decoders ask for. Rows hold 70, 0 and 33 tokens.
BESIDE = torch.cat([torch.zeros(8, 16, dtype=torch.bool), token_causal(8)], 1).to(DEVICE)
WINDOWS = {
    "draft": ([0], 16, None, {}),
    "causal": ([2, 0], 8, token_causal(8, DEVICE), {}),
    "verify": ([2, 0, 1], 32, two_copy_verify(16, DEVICE), {}),
    "prefill": ([1, 2], 80, block_causal(80, 4, DEVICE), {}),
    "inside a block": ([2, 0, 1], 8, None, {"offset": [0, 8, 4], "width": 16}),
    "behind a block": ([2, 0], 8, BESIDE, {"offset": 16}),
    "anywhere": ([2, 1], 70, torch.rand(2, 70, 90, device=DEVICE) < 0.5, {"offset": [3, 11], "width": 90}),
}


def on_device(model, dtype=torch.float32):
    """``model`` with random weights, ready for inference."""
    torch.manual_seed(0)
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        norm = "norm" in name
        torch.nn.init.normal_(weight.data, mean=float(norm), std=0.2 if norm else 0.15)
    return model.to(DEVICE, dtype).eval().requires_grad_(False)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def filled(model, lengths=(70, 0, 33), slots=256):
    cache = model.new_cache(len(lengths), slots)
    cache.keys.normal_()
    cache.values.normal_()
    cache.commit(lengths)
    return cache


def run(fast: FastForward, ids, positions, window: Window, mask=None, **how):
    """A fast forward in ``window``."""
    where = window.where
    moved = {"offsets": where.offset, "width": where.width, "write_rows": where.write_rows}
    return fast(ids, positions, window.cache, where.rows, window.prefix, mask, **moved, **how)


def matches_the_plain_forward(model, name: str, tolerance: float, picks=(None, slice(2, 5), "some")):
    """Logits and cache, for all positions, a slice of them, and chosen ones."""
    rows, tokens, mask, moved = WINDOWS[name]
    fast, cache = fast_forward_of(model, required=True), filled(model)
    ids, positions = (torch.randint(high, (len(rows), tokens), device=DEVICE) for high in (VOCABULARY, 500))
    keys, values = cache.keys.clone(), cache.values.clone()
    for at in picks:
        at = torch.randint(tokens, (len(rows), 3), device=DEVICE) if at == "some" else at
        cache.keys.copy_(keys)
        cache.values.copy_(values)
        window = cache.window(tokens, rows, **moved)
        want = model(ids, positions, window, mask, logits_at=at)
        want_keys, want_values = cache.keys.clone(), cache.values.clone()
        cache.keys.copy_(keys)
        cache.values.copy_(values)
        got = run(fast, ids, positions, window, mask, logits_at=at)
        assert got.shape == want.shape
        assert error(got, want) <= tolerance
        assert error(cache.keys, want_keys) <= tolerance
        assert error(cache.values, want_values) <= tolerance


def batches_match(model, rows: int):
    """A draft of 8 tokens in each of ``rows`` rows, and 4 tokens with more logits than tokens: the plain logits in float32, and in bfloat16 as near to
    float64 as those.
    """
    fast = fast_forward_of(model, required=True)
    exact = None if model.dtype == torch.float32 else copy.deepcopy(model).double()
    for tokens, picks in ((8, None), (4, 5)):
        lengths = torch.randint(100, (rows,)).tolist()
        cache = filled(model, lengths)
        ids, positions = (torch.randint(high, (rows, tokens), device=DEVICE) for high in (VOCABULARY, 500))
        at = None if picks is None else torch.randint(tokens, (rows, picks), device=DEVICE)
        window = cache.window(tokens)
        want = model(ids, positions, window, logits_at=at)
        got = run(fast, ids, positions, window, logits_at=at)
        if exact is None:
            assert error(got, want) <= 1e-5
        else:
            doubled = filled(exact, lengths)
            doubled.keys.copy_(cache.keys)
            doubled.values.copy_(cache.values)
            truth = exact(ids, positions, doubled.window(tokens), logits_at=at)
            assert error(got, truth) <= 1.5 * error(want, truth)


def padding_writes_nothing(model, tokens: int):
    fast, cache = fast_forward_of(model, required=True), filled(model, [20, 40, 60])
    ids = torch.randint(VOCABULARY, (3, tokens), device=DEVICE)
    positions = torch.arange(tokens, device=DEVICE).expand(3, tokens)
    alone = run(fast, ids[1:2], positions[1:2], cache.window(tokens, [2]))
    written = cache.keys.clone()
    padded = fast(ids, positions, cache, torch.tensor([-1, 2, -1], device=DEVICE), cache.length[[0, 2, 1]])
    assert error(padded[1:2], alone) <= 1e-5
    assert padded.isfinite().all()
    assert error(cache.keys, written) <= 1e-5
    assert torch.equal(cache.keys[:, :2], written[:, :2])


def entries_that_only_write_are_seen(model, tokens: int):
    """A commit in the forward that drafts the next block: the same as one after the other."""
    fast, cache = fast_forward_of(model, required=True), filled(model, [20, 40, 60])
    ids = torch.randint(VOCABULARY, (3, tokens), device=DEVICE)
    positions = torch.arange(tokens, device=DEVICE) + torch.tensor([[60], [40 + tokens], [40]], device=DEVICE)
    window = cache.window(tokens, [2, 1, 1], ahead=[0, tokens, 0])
    mask = torch.stack([torch.ones(tokens, tokens, dtype=torch.bool)] * 2 + [token_causal(tokens)]).to(DEVICE)
    got = run(fast, ids, positions, window, mask, logit_rows=2)
    fast(ids[2:], positions[2:], cache, window.where.rows[2:], window.prefix[2:], mask[2:])
    want = fast(ids[:2], positions[:2], cache, window.where.rows[:2], window.prefix[:2])
    assert got.shape == want.shape
    assert error(got, want) <= 1e-5
    assert error(model(ids, positions, window, mask, logit_rows=2), want) <= 1e-5


# (tokens, mask, how the window is moved) of three branches.
BRANCHES = {
    "small batch": (8, None, {}),
    "large batch": (16, two_copy_verify(8, DEVICE), {}),
    "many tokens": (70, token_causal(70, DEVICE), {}),
    "inside a block": (8, None, {"offset": [0, 8, 4], "width": 16}),
    "anywhere": (70, torch.rand(3, 70, 90, device=DEVICE) < 0.5, {"offset": [3, 11, 0], "width": 90}),
}


def branches_share_a_prefix(model, name: str):
    """Entries that read one row and write another: the plain network over rows into which the prefixes were copied, and nothing else is written."""
    tokens, mask, moved = BRANCHES[name]
    reads, writes, prefixes = [0, 0, 2], [1, 3, 4], [33, 33, 20]
    cache, copied = filled(model, [33, 0, 20, 0, 0]), filled(model, [33, 33, 20, 33, 20])
    keys, values = cache.keys.clone(), cache.values.clone()
    for store, twin in ((keys, copied.keys), (values, copied.values)):
        twin.copy_(store)
        for read, write, prefix in zip(reads, writes, prefixes, strict=True):
            twin[:, write, :, :prefix] = store[:, read, :, :prefix]
    ids, positions = (torch.randint(high, (3, tokens), device=DEVICE) for high in (VOCABULARY, 500))
    window = cache.window(tokens, reads, write_rows=writes, **moved)
    got = run(fast_forward_of(model, required=True), ids, positions, window, mask, logit_rows=2)
    want = model(ids, positions, copied.window(tokens, writes, **moved), mask, logit_rows=2)
    assert error(got, want) <= 1e-5
    for write, first in zip(
        writes, (window.prefix + (0 if window.plain else window.where.offset)).tolist(), strict=True
    ):
        written = slice(first, first + tokens)
        for store, twin, before in ((cache.keys, copied.keys, keys), (cache.values, copied.values, values)):
            assert error(store[:, write, :, written], twin[:, write, :, written]) <= 1e-5
            store[:, write, :, written] = before[:, write, :, written]
    assert torch.equal(cache.keys, keys)
    assert torch.equal(cache.values, values)


def features_are_the_outputs_of_layers(model, tokens: int):
    """Of every entry, whatever gets logits."""
    cache, plain = filled(model), []
    ids, positions = (torch.randint(high, (2, tokens), device=DEVICE) for high in (VOCABULARY, 500))
    window = cache.window(tokens, [2, 0])
    hooks = [layer.register_forward_hook(lambda *call: plain.append(call[-1])) for layer in model.model.layers]
    model(ids, positions, window)
    for hook in hooks:
        hook.remove()
    sink = Features(range(len(plain)))
    run(fast_forward_of(model, required=True), ids, positions, window, logit_rows=1, features=sink)
    for layer, want in enumerate(plain):
        assert sink.of(layer).shape == want.shape
        assert error(sink.of(layer), want) <= 1e-5, f"layer {layer}"


# (rows, tokens, picks, how the window is moved): each of these is captured at 1, 2 and 3 rows.
REPLAYS = [
    ([1], 16, 0, {}),
    ([2, 0], 16, 5, {}),
    ([0, 1, 2], 8, 8, {"offset": [0, 8, 4], "width": 16}),
    ([2], 8, 9, {"offset": 16}),
    ([0, 0], 8, 0, {"write_rows": [1, 2]}),
]
WITH_FEATURES = Shape(1, 12, features=(1, 0))


def replays_equal_eager(model):
    """Captured shapes repeat the eager forward bit for bit, logits and cache."""
    kinds = [
        Shape(
            1,
            tokens,
            picks,
            width=moved.get("width") or moved.get("offset", -tokens) + tokens,
            branches="write_rows" in moved,
        )
        for _, tokens, picks, moved in REPLAYS
    ]
    engine = Engine(model, 3, 256, [*kinds, WITH_FEATURES], Runtime(graphs=True))
    assert not engine.cache.keys.any(), "capturing writes nothing"
    engine.cache.keys.normal_()
    engine.cache.values.normal_()
    engine.cache.commit([20, 40, 60])
    runner = engine.runner
    for rows, tokens, picks, moved in REPLAYS:
        ids, positions = (torch.randint(high, (len(rows), tokens), device=DEVICE) for high in (VOCABULARY, 500))
        window = engine.cache.window(tokens, rows, **moved)
        mask = torch.rand(len(rows), tokens, window.width, device=DEVICE) < 0.5
        at = torch.randint(tokens, (len(rows), picks), device=DEVICE) if picks else None
        seen, keys = [], engine.cache.keys.clone()
        for engine.runner in (None, runner):
            engine.cache.keys.copy_(keys)
            seen.append(engine.forward(ids, positions, window, mask, logits_at=at).clone())
            seen.append(engine.cache.keys.clone())
        branches = "write_rows" in moved
        assert runner.replays[Shape(len(rows), tokens, picks, width=window.where.width, branches=branches)] == 1
        assert torch.equal(seen[2], seen[0])
        assert torch.equal(seen[3], seen[1])
    ids, positions = (torch.randint(high, (2, WITH_FEATURES.tokens), device=DEVICE) for high in (VOCABULARY, 500))
    sinks = []
    for engine.runner in (None, runner):
        sinks.append(Features(WITH_FEATURES.features))
        engine.forward(ids, positions, engine.cache.window(WITH_FEATURES.tokens, [2, 0]), None, features=sinks[-1])
    assert torch.equal(sinks[1].hidden, sinks[0].hidden)


def weights_are_held_once(model):
    """Fusing changes no weight and copies none."""
    fast = fast_forward_of(model, required=True)
    held = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    for layer in fast.layers:
        assert layer.qkv.untyped_storage().data_ptr() in held
        assert layer.out.untyped_storage().data_ptr() in held
    assert fast.current()
    model.double()
    assert not fast.current(), "the weights were cast since"


def refusals_say_why(model):
    """``model`` is served where kernels run, its float16 twin nowhere; errors name the model's class."""
    name = type(model).__name__
    if available(DEVICE):
        assert fast_forward_of(model) is not None
    else:
        assert fast_forward_of(model) is None
        with pytest.raises(UserError, match=f"{name} cannot be used: it needs a CUDA device"):
            fast_forward_of(model, required=True)
    model.half()
    assert fast_forward_of(model) is None
    with pytest.raises(UserError, match=f"{name} cannot be used: .*{'float16' if available(DEVICE) else 'CUDA'}"):
        fast_forward_of(model, required=True)
