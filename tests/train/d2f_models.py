"""Small random networks of both backends, and a batch whose rows have prompts of different lengths."""

from __future__ import annotations

import torch

from d2f.modeling_d2f import BACKENDS
from train.data import Batch
from train.recipes import initialise

MASK, VOCAB, LENGTH = 30, 31, 64
NAMES = list(BACKENDS)


def network(name: str):
    kind = BACKENDS[name]
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.2,
        "mask_token_id": MASK,
    }
    return initialise(kind(kind.config_class(**sizes)), 0)


def batch() -> Batch:
    """Answers of 32, 64 - 11 and 24 tokens."""
    tokens = torch.randint(0, MASK, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    at = torch.arange(LENGTH)
    first, stop = torch.tensor([[4], [11], [20]]), torch.tensor([[36], [64], [44]])
    return Batch(tokens, (at >= first) & (at < stop))
