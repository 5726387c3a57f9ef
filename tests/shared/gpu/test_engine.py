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

KINDS = [Shape(1, 8, commit_rows=1, lasting=True), Shape(1, 4, picks=4, width=8)]
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")


def _model() -> SDARForCausalLM:
    return SDARForCausalLM.from_pretrained(golden_folder("SDAR") / "model")


def test_without_a_gpu_the_model_itself_runs():
    model = _model()
    engine = Engine.of(model, rows=2, slots=40, kinds=KINDS, runtime=Runtime(fast=False))
    assert engine.fast is engine.runner is None
    assert engine.capture_seconds == 0
    assert model.engine is None, "without graphs nothing is worth keeping"
    ids, positions = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.arange(3).expand(2, 3)
    logits = engine.forward(ids, positions, engine.cache.window(3), None, logit_rows=1, logits_at=slice(1, None))
    want = model(ids, positions, model.new_cache(2, 40).window(3))[:1, 1:]
    assert torch.allclose(logits, want, atol=1e-5)


@on_cpu
def test_asking_for_what_cannot_run_says_why():
    with pytest.raises(UserError, match="CUDA"):
        Engine.of(_model(), 1, 40, KINDS, Runtime(fast=True))


def test_an_engine_serves_what_fits_in_it():
    engine = Engine(_model(), rows=4, slots=64, kinds=KINDS, runtime=Runtime(fast=False))
    same = {"rows": 4, "slots": 64, "kinds": KINDS, "runtime": Runtime(fast=False)}
    assert engine.serves(**same)
    assert engine.serves(**{**same, "rows": 1, "slots": 10})
    assert engine.serves(**{**same, "kinds": KINDS[:1]}), "more kinds than asked for"
    for other in ({"rows": 5}, {"slots": 65}, {"kinds": [*KINDS, Shape(1, 8, picks=1)]}, {"runtime": Runtime()}):
        assert not engine.serves(**{**same, **other}), other
    engine.fast = SimpleNamespace(current=lambda: False)
    assert not engine.serves(**same), "the weights were moved or cast since"


def test_shapes_are_the_kinds_at_every_batch_with_every_number_of_commits():
    engine = Engine(_model(), 3, 64, KINDS, Runtime(fast=False))
    shapes = engine.shapes(3)
    assert {(s.logit_rows, s.commit_rows) for s in shapes if s.tokens == 8} == {
        (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2), (3, 3),
    }  # fmt: skip
    assert [s for s in shapes if s.tokens == 4] == [Shape(b, 4, 4, width=8) for b in (1, 2, 3)]
    assert all(s.lasting == (s.tokens == 8) for s in shapes)


def test_masks_that_are_added_go_to_the_plain_network():
    model = _model()
    engine = Engine(model, rows=1, slots=40, kinds=(), runtime=Runtime(fast=False))
    engine.fast = lambda *args, **how: pytest.fail("kernels take bool masks")
    model.backend = "reference"
    ids, bias = torch.tensor([[1, 2, 3]]), torch.zeros(3, 3).masked_fill(~torch.ones(3, 3).tril().bool(), -torch.inf)
    positions = torch.arange(3)[None]
    got = engine.forward(ids, positions, engine.cache.window(3), bias)
    want = model(ids, positions, model.new_cache(1, 40).window(3), bias == 0)
    assert torch.allclose(got, want, atol=1e-5)


def test_the_fast_forward_is_told_where_it_reads_and_writes():
    engine, asked = Engine(_model(), rows=2, slots=40, kinds=(), runtime=Runtime(fast=False)), []
    engine.fast = lambda **given: asked.append(given)
    engine.cache.commit([3, 5])
    ids, positions = torch.tensor([[1, 2], [3, 4]]), torch.arange(2).expand(2, 2)
    engine.forward(ids, positions, engine.cache.window(2), None)
    engine.forward(ids, positions, engine.cache.window(2, [1, 0], offset=[0, 6], width=8), None)
    engine.forward(ids, positions, engine.cache.window(2, [0, 0], ahead=[2, 0], write_rows=[1, 0]), None)
    plain, moved, branched = asked
    assert plain["rows"].tolist() == [0, 1]
    assert plain["prefixes"].tolist() == [3, 5]
    assert plain["offsets"] is plain["write_rows"] is None
    assert moved["prefixes"].tolist() == [5, 3]
    assert (moved["offsets"].tolist(), moved["width"]) == ([0, 6], 8)
    assert (branched["prefixes"].tolist(), branched["write_rows"].tolist()) == ([5, 3], [1, 0])
