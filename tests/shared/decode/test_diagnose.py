from __future__ import annotations

import pytest
import torch
from torch import nn

from shared.decode.diagnose import first_broken_layer


class Spoil(nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.value = value

    def forward(self, x):
        return x * self.value


def test_the_first_layer_that_is_not_finite_is_named():
    for values, name in (
        ([1.0, 2.0], "the head"),
        ([1.0, float("nan"), 1.0], "layer 1"),
        ([float("inf"), float("nan")], "layer 0"),
    ):
        layers = nn.Sequential(*map(Spoil, values))
        assert first_broken_layer(layers, lambda net=layers: net(torch.ones(2))) == name


def test_hooks_are_removed_even_after_an_error():
    layers = nn.Sequential(Spoil(1.0))

    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        first_broken_layer(layers, fail)
    assert not layers[0]._forward_hooks
