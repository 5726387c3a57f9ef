"""What an engine stages for a graph against the window it was given, on a CPU: see `tests.standin`."""

from __future__ import annotations

import pytest
import torch

from sdar import SDARForCausalLM
from shared.gpu.engine import Engine, Inputs
from shared.gpu.graphs import Shape
from shared.network.features import Features
from shared.network.masks import token_causal
from shared.options import Runtime
from tests.family_checks import golden_folder
from tests.standin import see_only_what_was_staged

ROWS, SLOTS, TOKENS = 5, 48, 4
KINDS = [
    Shape(1, TOKENS, commit_rows=1, lasting=True),
    Shape(1, TOKENS, picks=2),
    Shape(1, TOKENS, picks=3, width=9),
    Shape(1, TOKENS, branches=True),
    Shape(1, TOKENS, features=(1, 0)),
]
CAUSAL = token_causal(TOKENS)
UNSEEN = torch.cat([torch.zeros(TOKENS, 5, dtype=torch.bool), CAUSAL], 1)  # what lies between the prefix and the tokens
# name: (rows, window, mask, picks, entries with logits, layers wanted)
FORWARDS = {
    "rows in order": ([0, 1, 2, 3, 4], {}, None, 0, None, ()),
    "one row": ([3], {}, CAUSAL, 0, None, ()),
    "three rows, in a graph of four": ([4, 0, 2], {}, None, 0, None, ()),
    "no mask after a mask": ([1], {}, None, 0, None, ()),
    "some logits": ([2, 0], {}, CAUSAL, 2, None, ()),
    "a commit goes along": ([0, 3, 3], {"ahead": [0, TOKENS, 0]}, None, 0, 2, ()),
    "commits go along, with padding on both sides": ([1, 2, 4, 1, 2, 4], {"ahead": [TOKENS] * 3 + [0] * 3}, CAUSAL, 0, 3, ()),
    "inside a block": ([2, 1, 0], {"offset": [0, 5, 2], "width": 9}, None, 3, None, ()),
    "behind a block": ([2], {"offset": 5}, UNSEEN, 3, None, ()),
    "branches": ([0, 0, 2], {"write_rows": [1, 3, 4]}, CAUSAL, 0, None, ()),
    "features": ([1, 4, 0], {}, CAUSAL, 0, None, (1, 0)),
}  # fmt: skip


def new_engine() -> Engine:
    model = SDARForCausalLM.from_pretrained(golden_folder("SDAR") / "model", dtype=torch.float64)
    engine = Engine(model, ROWS, SLOTS, KINDS, Runtime())
    rng = torch.Generator().manual_seed(1)
    for store in (engine.cache.keys, engine.cache.values):
        store.copy_(torch.randn(store.shape, generator=rng, dtype=store.dtype))
    engine.cache.commit([7, 0, 12, 3, 20])
    return engine


def results(engine: Engine) -> dict[str, list[torch.Tensor]]:
    """Logits, features and the cache after each forward, one after the other on the same cache."""
    found, rng = {}, torch.Generator().manual_seed(2)
    for name, (rows, how, mask, picks, logit_rows, layers) in FORWARDS.items():
        window = engine.cache.window(TOKENS, rows, **how)
        ids = torch.randint(200, (len(rows), TOKENS), generator=rng)
        positions = window.prefix[:, None] + torch.arange(TOKENS)
        entries = len(rows) if logit_rows is None else logit_rows
        at = torch.randint(TOKENS, (entries, picks), generator=rng) if picks else None
        sink = Features(layers) if layers else None
        staged = engine.stage(Inputs(ids, positions, mask, at, logit_rows, layers), window.where)
        logits = engine.run(staged, window, sink)
        found[name] = [logits.clone(), engine.cache.keys.clone(), engine.cache.values.clone()]
        found[name] += [sink.hidden] if sink else []
    return found


@pytest.fixture(scope="module")
def plain():
    with torch.inference_mode():
        return results(new_engine())


@pytest.fixture(scope="module")
def staged():
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        see_only_what_was_staged(patch)
        engine = new_engine()
        found = results(engine)
        assert sum(engine.runner.replays.values()) == len(FORWARDS), "a forward had no graph"
    return found


@pytest.mark.parametrize("name", list(FORWARDS))
def test_a_replay_is_the_forward(name, plain, staged):
    assert len(plain[name]) == len(staged[name])
    for want, got in zip(plain[name], staged[name], strict=True):
        assert got.shape == want.shape
        assert torch.allclose(got, want, atol=1e-10)


def test_another_layer_or_row_would_be_seen(plain):
    """The checks above could fail: neighbours differ."""
    hidden = plain["features"][3]
    assert not torch.allclose(hidden[0], hidden[1])
    logits = plain["branches"][0]
    assert not torch.allclose(logits[0], logits[1])
