"""Lists of integers become device tensors once."""

import torch

from shared.network.indices import Indices


def test_same_list_same_tensor():
    indices = Indices("cpu")
    first = indices([2, 0])
    assert first.tolist() == [2, 0]
    assert first.dtype == torch.long
    assert indices((2, 0)) is first
    assert indices([0, 2]).tolist() == [0, 2]
    assert indices([]).shape == (0,)


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(Indices, "KEPT", 4)
    indices = Indices("cpu")
    for k in range(20):
        assert indices([k, k + 1]).tolist() == [k, k + 1]
        assert len(indices._kept) <= 4
