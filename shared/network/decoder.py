"""The pre-norm decoder of Llama, Qwen2.5, Qwen3 and their like, whose caller supplies the mask: one network, a few switches.

A family subclasses `DecoderModel` and says what differs: its configuration, its `Switches`, its special tokens, and a table of names where its
checkpoints call things otherwise. A network with other layers (experts, fused projections) gives its own `DecoderModel.layer`; embedding, masks,
features and the way to the logits stay those of here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from shared.errors import UserError
from shared.network.attention import attend
from shared.network.features import Features
from shared.network.loading import CheckpointModel
from shared.network.rotary import Rotary, rotate


class CacheView(Protocol):
    """Where one forward writes its keys and values and what it sees: a `Window` of `shared.network.kv_cache`, or anything alike."""

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take ``[B, H_kv, T, D]``, give all in reach, ``[B, H_kv, S, D]``."""

    def mask(self, local_mask: Tensor | None) -> Tensor | None:
        """``[B, 1, T, S]`` over all in reach; None: everything is seen."""


class RMSNorm(nn.Module):
    """``x / rms(x)`` in float32, cast back, then times ``weight``."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def normed(self, x: Tensor) -> Tensor:
        """``x / rms(x)``, float32."""
        wide = x.float()
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.normed(x).to(x.dtype)


class Float32RMSNorm(RMSNorm):
    """``x / rms(x) * weight``, all of it in float32, cast back once."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.normed(x) * self.weight.float()).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Switches:
    """What differs between these decoders. ``qk_norm``: a norm over each head's channels, of queries and of keys, before they are rotated."""

    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False  # of the projection that closes attention
    mlp_bias: bool = False
    norm: type[RMSNorm] = RMSNorm


class ForwardContext(NamedTuple):
    """What all layers of one forward share: rotary tables, cache, ``mask [B, 1, T, S]`` over everything in reach (or None), attention backend."""

    rope: tuple[Tensor, Tensor]
    cache: CacheView | None
    mask: Tensor | None
    backend: str

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotate, store, attend: ``q [B, H, T, D]``, ``k, v [B, H_kv, T, D]`` -> ``[B, T, H D]``."""
        q, k = rotate(q, *self.rope), rotate(k, *self.rope)
        if self.cache is not None:
            k, v = self.cache.update(layer, k, v)
        return rearrange(attend(q, k, v, self.mask, backend=self.backend), "b h t d -> b t (h d)")


class Attention(nn.Module):
    def __init__(self, config, layer: int, on: Switches):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        hidden, eps = config.hidden_size, config.rms_norm_eps
        wide, narrow = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, wide, bias=on.qkv_bias)
        self.k_proj = nn.Linear(hidden, narrow, bias=on.qkv_bias)
        self.v_proj = nn.Linear(hidden, narrow, bias=on.qkv_bias)
        self.o_proj = nn.Linear(wide, hidden, bias=on.out_bias)
        self.q_norm = on.norm(config.head_dim, eps) if on.qk_norm else None
        self.k_norm = on.norm(config.head_dim, eps) if on.qk_norm else None

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """``x [B, T, hidden]`` -> ``[B, T, hidden]``."""
        projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (rearrange(p, "b t (h d) -> b h t d", d=self.head_dim) for p in projected)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.o_proj(context.attend(self.layer, q, k, v))


class MLP(nn.Module):
    """``down(silu(gate x) * up x)``, ``width`` inside."""

    def __init__(self, hidden: int, width: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config, layer: int, on: Switches):
        super().__init__()
        self.self_attn = Attention(config, layer, on)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, on.mlp_bias)
        self.input_layernorm = on.norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = on.norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Stack(nn.Module):
    """What checkpoints call ``model``: an embedding of the name they give it, the layers, the last norm."""

    def __init__(self, config, embedding: str, layers: Iterable[nn.Module], norm: type[RMSNorm]):
        super().__init__()
        self.add_module(embedding, nn.Embedding(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(layers)
        self.norm = norm(config.hidden_size, config.rms_norm_eps)


class DecoderModel(CheckpointModel):
    """The network with its head. ``from_pretrained(path_or_hub_id)`` loads a released checkpoint.

    ``backend`` names the attention of `shared.network.attention`. `UserError` for a config that no network can be built from.
    """

    embedding_name: str = "embed_tokens"

    def __init__(self, config):
        super().__init__()
        if problem := config.problem():
            raise UserError(problem)
        self.config, self.backend, self.rotary = config, "sdpa", Rotary.of(config)
        layers = (self.layer(config, number) for number in range(config.num_hidden_layers))
        self.model = Stack(config, self.embedding_name, layers, self.switches(config).norm)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embedding.weight

    @staticmethod
    def switches(config) -> Switches:
        """How a network of ``config`` differs from the plain decoder."""
        return Switches()

    def layer(self, config, number: int) -> nn.Module:
        """Layer ``number``: ``(x [B, T, H], ForwardContext) -> [B, T, H]``, both residuals added."""
        return DecoderLayer(config, number, self.switches(config))

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.get_submodule(self.embedding_name)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cache: CacheView | None = None,
        local_mask: Tensor | None = None,
        *,
        logits_at: slice | Tensor | None = None,
        logit_rows: int | None = None,
        features: Features | None = None,
    ) -> Tensor:
        """Logits ``[B, T, V]`` for ``input_ids [B, T]`` at ``position_ids [B, T]``. Which token a row predicts, its own or the next, is the family's.

        ``cache``: what this forward writes to and reads from (None: the tokens see only each other).
        ``local_mask``: None (all T see each other), bool ``[T, W]`` or ``[B, T, W]`` (True = may attend), or additive float, which the reference
        attention alone can do and therefore does. ``logits_at`` limits which rows reach the head: a slice of T, or indices ``[B, K]`` -> ``[B, K, V]``.
        ``logit_rows``: only this many first entries of the batch reach it (default: all). ``features`` takes the outputs of the layers it names.
        """
        if features is not None:
            features.start(len(self.model.layers))
        x = self.embedding(input_ids)
        mask = whole_mask(cache, local_mask)
        backend = "reference" if mask is not None and mask.is_floating_point() else self.backend
        context = ForwardContext(self.rotary.tables(position_ids, x.dtype), cache, mask, backend)
        for number, layer in enumerate(self.model.layers):
            x = layer(x, context)
            if features is not None:
                features.take(number, x)
        return self.lm_head(self.model.norm(rows_for_logits(x, logits_at, logit_rows)))


def whole_mask(cache: CacheView | None, local_mask: Tensor | None) -> Tensor | None:
    """``[B, 1, T, S]`` over everything in reach, or None, of a local mask ``[T, W]`` or ``[B, T, W]``."""
    if cache is not None:
        return cache.mask(local_mask)
    if local_mask is None:
        return None
    return (local_mask if local_mask.dim() == 3 else local_mask[None])[:, None]


def rows_for_logits(x: Tensor, logits_at: slice | Tensor | None, logit_rows: int | None) -> Tensor:
    """What of ``x [B, T, H]`` reaches the head; see `DecoderModel.forward`."""
    x = x[:logit_rows]
    if isinstance(logits_at, slice):
        return x[:, logits_at]
    return x if logits_at is None else x.gather(1, logits_at[..., None].expand(-1, -1, x.shape[-1]))
