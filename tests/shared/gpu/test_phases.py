"""Phases against plain calls."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from shared.gpu.phases import Phases, call
from tests.recorder import recorder


@dataclass(frozen=True)
class Pair:
    total: Tensor
    note: str


def add(state, x: Tensor, scale: int) -> Pair:
    state.sum += x.sum() * scale
    return Pair(x * scale, "kept")


def double(state, pair: Pair) -> Tensor:
    return pair.total * 2


def owning(device="cpu", **state):
    tensors = {k: torch.tensor(v, device=device) for k, v in state.items()}
    return SimpleNamespace(STATE=tuple(tensors), unnamed=torch.ones(()), **tensors)


def new(**state):
    owner = owning(**state)
    return owner, Phases("same", [owner], lambda t: False, recorder([owner]))


def test_replays_are_calls():
    owner, phases = new(sum=0.0)
    plain = owning(sum=0.0)
    for k in range(6):
        x, scale = torch.arange(3.0) + k, 2 + k % 2
        got, want = phases(double, owner, phases(add, owner, x, scale)), call(double, plain, call(add, plain, x, scale))
        assert torch.equal(got, want)
        assert torch.equal(owner.sum, plain.sum)
    assert len(phases._captured) >= 4, "add by 2, add by 3, and double of what either returned"


def test_shapes_and_constants_have_graphs_of_their_own():
    owner, phases = new(sum=0.0)
    for size in (2, 3, 2, 3, 2, 3):
        assert torch.equal(phases(add, owner, torch.ones(size), 5).total, torch.full((size,), 5.0))
    assert len(phases._captured) == 2


def test_what_is_kept_on_a_result_is_not_there_next_time():
    owner, phases = new(sum=0.0)
    results = [phases(add, owner, torch.ones(2), 1) for _ in range(4)]
    assert results[2] is not results[3]
    assert results[2].total.data_ptr() == results[3].total.data_ptr(), "the same memory"


def test_an_argument_that_is_never_written_is_copied_once():
    owner, phases = new(sum=0.0)
    index, other = torch.ones(2), torch.full((2,), 5.0)
    index.never_written = other.never_written = True
    for given, want in ((index, 2.0), (index, 2.0), (index, 2.0), (other, 10.0), (index, 2.0)):
        assert phases(add, owner, given, 2).total.tolist() == [want, want]
    (captured,) = phases._captured.values()
    captured.inputs[0].fill_(7.0)
    assert phases(add, owner, index, 2).total.tolist() == [14.0, 14.0], "it was not copied again"
    assert phases(add, owner, torch.ones(2), 2).total.tolist() == [2.0, 2.0], "one that may have been written is"


def test_another_decode_is_adopted_with_its_state():
    owner, phases = new(sum=1.0)
    for _ in range(3):
        phases(add, owner, torch.ones(2), 1)
    other = owning(sum=10.0)
    assert phases.adopt("same", [other])
    assert other.sum.data_ptr() == owner.sum.data_ptr()
    assert other.unnamed.data_ptr() != owner.unnamed.data_ptr(), "only what is named is state"
    phases(add, other, torch.ones(2), 1)
    assert float(other.sum) == 12


@pytest.mark.parametrize(
    ("signature", "state"),
    [("other", {"sum": 1.0}), ("same", {"sum": [1.0, 2.0]}), ("same", {"total": 1.0}), ("same", {"sum": 1})],
)
def test_what_does_not_fit_is_not_adopted(signature, state):
    owner, phases = new(sum=3.0)
    other = owning(**state)
    assert not phases.adopt(signature, [other])
    assert float(owner.sum) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graphs_are_calls():
    owner = owning("cuda", sum=0.0)
    plain = owning("cuda", sum=0.0)
    phases = Phases("same", [owner], lambda t: False)
    for k in range(6):
        x = torch.arange(3.0, device="cuda") + k
        got, want = phases(double, owner, phases(add, owner, x, 3)), call(double, plain, call(add, plain, x, 3))
        assert torch.equal(got, want)
        assert torch.equal(owner.sum, plain.sum)
    assert len(phases._captured) == 2


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.__setitem__((torch.zeros_like(x, dtype=torch.long),), 3.0),
        lambda x: x + torch.tensor([1.0, 2.0]),
    ],
    ids=["reads", "selects by a mask", "assigns a number through indices", "makes a tensor of numbers"],
)
def test_the_stand_in_refuses_what_a_capture_refuses(function):
    x = torch.ones(2)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        recorder([])(lambda: function(x), None)
