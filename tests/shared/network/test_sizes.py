"""A network's sizes by hand."""

from __future__ import annotations

import torch
from torch import nn

from llada2 import LLaDA2MoeConfig, LLaDA2MoeModelLM
from sdar import SDARConfig, SDARForCausalLM
from shared.network.sizes import sizes_of
from shared.output import Sizes
from shared.trace import Spent

SMALL = {"vocab_size": 10, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
# Of each of 2 layers: queries and output 2 x 8 x 4, keys and values 2 x 4 x 4, feed-forward 3 x 4 x 8, norms 2 x 4 + 2 x 4; the last norm 4.
BODY = 2 * (2 * 32 + 2 * 16 + 96 + 16) + 4


def small(**more) -> SDARForCausalLM:
    return SDARForCausalLM(SDARConfig(**SMALL, hidden_size=4, intermediate_size=8, head_dim=4, **more))


def test_a_dense_network():
    assert sizes_of(small()) == Sizes(body=BODY, head=40, cached=2 * 1 * 4 * 2, queries=2 * 4 * 2, number_bytes=4)
    assert sizes_of(small().to(torch.bfloat16)).number_bytes == 2


def test_a_head_that_is_the_embedding_is_counted_once():
    model = small(tie_word_embeddings=True)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert (sizes_of(model).body, sizes_of(model).head) == (BODY, 40)


def test_a_drafter_without_embedding_and_head():
    model = small()
    model.lm_head, model.model.embed_tokens = None, None
    assert (sizes_of(model).body, sizes_of(model).head) == (BODY, 0)


def test_experts():
    """One layer of 8 experts of 3 x 4 x 16 weights, two a token."""
    config = LLaDA2MoeConfig(
        **SMALL, hidden_size=16, head_dim=16, first_k_dense_replace=1, intermediate_size=8, num_experts=8, n_group=2, topk_group=1,
        moe_intermediate_size=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = LLaDA2MoeModelLM(config)
    sizes = sizes_of(model)
    assert (sizes.expert, sizes.experts, sizes.chosen, sizes.expert_layers) == (3 * 4 * 16, 8, 2, 1)
    assert sizes.body == sum(p.numel() for p in model.parameters()) - 8 * 3 * 4 * 16 - 2 * 160
    one = sizes.work(Spent(forwards=1, tokens=1))
    assert one.read_bytes == 4 * (sizes.body + 2 * 192), "a single token reads the experts it chose"
    assert isinstance(model.lm_head, nn.Linear)
