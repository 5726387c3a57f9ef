"""A network in numbers, from its modules and its configuration."""

from __future__ import annotations

import torch
from torch import nn

from shared.output import Sizes


def expert_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that hold experts: each has a router ``gate``, and ``experts`` whose weights are stacks ``[E, ...]``."""
    return [m for m in model.modules() if hasattr(m, "gate") and hasattr(m, "experts")]


def sizes_of(model) -> Sizes:
    """The `Sizes` of a network. Without an embedding or a head (a drafter may use its target's) it is counted without them."""
    config, layers = model.config, expert_layers(model)
    stacks = [p for layer in layers for p in layer.experts.parameters()]
    embedding = next((m.weight for m in model.modules() if isinstance(m, nn.Embedding)), None)
    head = getattr(getattr(model, "lm_head", None), "weight", None)
    apart = {id(p) for p in (embedding, head, *stacks)}
    numbers = config.head_dim * config.num_hidden_layers
    return Sizes(
        body=sum(p.numel() for p in model.parameters() if id(p) not in apart),
        head=0 if head is None else head.numel(),
        cached=2 * config.num_key_value_heads * numbers,
        queries=config.num_attention_heads * numbers,
        number_bytes=torch.empty(0, dtype=model.dtype).element_size(),
        expert=sum(p[0].numel() for p in layers[0].experts.parameters()) if layers else 0,
        experts=len(next(layers[0].experts.parameters())) if layers else 0,
        chosen=config.num_experts_per_tok if layers else 0,
        expert_layers=len(layers),
    )
