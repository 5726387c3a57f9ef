"""Which engine serves a decode, and what it asks of graphs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sdar import SDARForCausalLM
from shared.errors import UserError
from shared.gpu.engine import Engine
from shared.gpu.graphs import Shape
from shared.options import Runtime
from tests.family_checks import golden_folder

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")


def _model() -> SDARForCausalLM:
    return SDARForCausalLM.from_pretrained(golden_folder("SDAR") / "model")


def test_without_a_gpu_the_model_itself_runs():
    model = _model()
    engine = Engine.of(model, rows=2, slots=40, block_length=8, runtime=Runtime(fast=False))
    assert engine.fast is engine.runner is None
    assert engine.capture_seconds == 0
    assert (engine.queries(3), engine.verify_tokens(5)) == (3, 5), "nothing is rounded to captured sizes"
    ids, positions = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.arange(3).expand(2, 3)
    logits = engine.forward(ids, positions, engine.cache.window(3), None, logit_rows=1, logits_at=slice(1, None))
    want = model(ids, positions, model.new_cache(2, 40).window(3))[:1, 1:]
    assert torch.allclose(logits, want, atol=1e-5)


@on_cpu
def test_asking_for_what_cannot_run_says_why():
    with pytest.raises(UserError, match="CUDA"):
        Engine.of(_model(), 1, 40, 8, Runtime(fast=True))


def test_an_engine_serves_what_fits_in_it():
    engine = Engine(_model(), rows=4, slots=64, block_length=8, runtime=Runtime(fast=False))
    same = {"rows": 4, "slots": 64, "block_length": 8, "runtime": Runtime(fast=False)}
    assert engine.serves(**same)
    assert engine.serves(**{**same, "rows": 1, "slots": 10})
    for other in ({"rows": 5}, {"slots": 65}, {"block_length": 4}, {"runtime": Runtime()}):
        assert not engine.serves(**{**same, **other}), other
    engine.fast = SimpleNamespace(current=lambda: False)
    assert not engine.serves(**same), "the weights were moved or cast since"


def test_kinds_decide_the_shapes():
    runtime = Runtime(fast=False)
    kinds = [Shape(1, 8, picks=4, lasting=True), Shape(1, 4, picks=4, width=8)]
    engine = Engine(_model(), 2, 64, 8, runtime, kinds)
    assert engine.shapes(2) == [Shape(1, 8, 4), Shape(2, 8, 4), Shape(1, 4, 4, width=8), Shape(2, 4, 4, width=8)]
    assert [s.lasting for s in engine.shapes(2)] == [True, True, False, False]
    assert engine.serves(1, 64, 8, runtime, kinds[:1]), "more kinds than asked for"
    assert not engine.serves(1, 64, 8, runtime, [*kinds, Shape(1, 8, picks=1)])
    assert not engine.serves(1, 64, 8, runtime), "its shapes do not follow from the block length"


def test_masks_that_are_added_go_to_the_plain_network():
    model = _model()
    engine = Engine(model, rows=1, slots=40, block_length=8, runtime=Runtime(fast=False))
    engine.fast = lambda *args, **how: pytest.fail("kernels take bool masks")
    model.backend = "reference"
    ids, bias = torch.tensor([[1, 2, 3]]), torch.zeros(3, 3).masked_fill(~torch.ones(3, 3).tril().bool(), -torch.inf)
    positions = torch.arange(3)[None]
    got = engine.forward(ids, positions, engine.cache.window(3), bias)
    want = model(ids, positions, model.new_cache(1, 40).window(3), bias == 0)
    assert torch.allclose(got, want, atol=1e-5)


def test_the_fast_forward_is_told_of_windows_that_are_not_plain():
    engine, asked = Engine(_model(), rows=2, slots=40, block_length=8, runtime=Runtime(fast=False)), []
    engine.fast = lambda *args, **how: asked.append(how)
    ids, positions = torch.tensor([[1, 2], [3, 4]]), torch.arange(2).expand(2, 2)
    engine.forward(ids, positions, engine.cache.window(2), None)
    engine.forward(ids, positions, engine.cache.window(2, offset=[0, 6], width=8), None)
    assert "offsets" not in asked[0]
    assert (asked[1]["offsets"].tolist(), asked[1]["width"]) == ([0, 6], 8)


def test_shapes_cover_every_batch_and_every_rider():
    engine = Engine(_model(), rows=3, slots=64, block_length=8, runtime=Runtime(fast=False))
    shapes = engine.shapes(3)
    assert {(s.logit_rows, s.commit_rows) for s in shapes if not s.picks} == {
        (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2), (3, 3),
    }  # fmt: skip
    assert {(s.tokens, s.picks) for s in shapes if s.picks} == {(10, 2), (12, 4), (16, 8)}
    assert Shape(3, 16, picks=8) in shapes
    engine.runner = object()
    assert [engine.queries(n) for n in (1, 2, 3, 5, 8)] == [2, 2, 4, 8, 8]
    assert engine.verify_tokens(3) == 8
