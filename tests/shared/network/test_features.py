from __future__ import annotations

import pytest
import torch

from sdar import SDARConfig, SDARForCausalLM
from shared.errors import UserError
from shared.network.features import Features
from shared.network.masks import token_causal

IDS, POSITIONS = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.arange(3).expand(2, -1)


def model() -> SDARForCausalLM:
    sizes = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SDARForCausalLM(SDARConfig(**sizes, head_dim=4)).eval().requires_grad_(False)


def test_they_are_the_outputs_of_the_layers():
    network, outputs = model(), []
    for layer in network.model.layers:
        layer.register_forward_hook(lambda module, args, out: outputs.append(out))
    features = Features((2, 0, 2, 3))
    want = network(IDS, POSITIONS)
    logits = network(IDS, POSITIONS, features=features)
    assert torch.equal(logits, want), "the forward returns what it returned"
    assert torch.equal(features.hidden, torch.stack([outputs[4 + layer] for layer in (2, 0, 2, 3)]))
    assert not torch.equal(features.hidden[3], network.model.norm(features.hidden[3])), "before the last norm"


def test_every_entry_whatever_gets_logits():
    network, some, all_of_them = model(), Features((1,)), Features((1,))
    network(IDS, POSITIONS, None, token_causal(3), logit_rows=1, logits_at=slice(0, 0), features=some)
    network(IDS, POSITIONS, None, token_causal(3), features=all_of_them)
    assert some.hidden.shape == (1, 2, 3, 8)
    assert torch.equal(some.hidden, all_of_them.hidden)


def test_what_was_read_stays_and_the_next_forward_replaces_it():
    network, features = model(), Features((0,))
    network(IDS, POSITIONS, features=features)
    first = features.hidden
    kept = first.clone()
    network(IDS.flip(1), POSITIONS, features=features)
    assert torch.equal(first, kept)
    assert not torch.equal(features.hidden, kept)


def test_a_forward_may_go_on_in_place():
    features, x = Features((0, 1)), torch.ones(1, 1, 2)
    features.start(2)
    for layer in range(2):
        features.take(layer, x)
        x += 1
    assert features.hidden[:, 0, 0, 0].tolist() == [1.0, 2.0]


def test_read_before_a_forward_filled_them():
    features = Features((1, 3))
    with pytest.raises(RuntimeError, match="features of layer 1 are read before a forward filled them"):
        _ = features.hidden
    model()(IDS, POSITIONS, features=features)
    features.start(4)
    features.take(1, torch.zeros(1, 1, 8))
    with pytest.raises(RuntimeError, match="features of layer 3 are read before"):
        _ = features.hidden


@pytest.mark.parametrize(
    ("layers", "message"),
    [((0, -1), "layer -1: no such layer"), (("1",), "layer '1': no such layer"), ((), "no layer at all")],
)
def test_layers_no_network_has(layers, message):
    with pytest.raises(UserError, match=message):
        Features(layers)


def test_layers_this_network_lacks():
    features = Features((1, 4))
    with pytest.raises(UserError, match=r"features of layer 4: no such layer\. Allowed: 0 to 3"):
        model()(IDS, POSITIONS, features=features)
