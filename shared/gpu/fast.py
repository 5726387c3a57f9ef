"""The fast forward of a decoder network on a GPU, through the kernels of `shared.gpu.triton_ops`.

Same weights, same numbers up to rounding, no host read, and therefore fit for CUDA graphs. Few tokens take the narrow way (no elementwise kernel:
see `shared.gpu.triton_ops`), many take the wide way (cuBLAS and elementwise kernels). A family subclasses `FastForward` and says what differs.

    fast = FastSDAR(model)
    cache = model.new_cache(rows=4, slots=2048)
    window = cache.window(16, rows=[0, 2])
    logits = fast(input_ids, position_ids, cache, window.row_index, window.prefix, local_mask)      # nothing is committed
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import UserError
from shared.gpu import triton_ops as ops
from shared.gpu.graphs import on_device
from shared.network.kv_cache import BlockCache
from shared.network.loading import CheckpointModel
from shared.network.rotary import rotary_tables


def fuse_rows(projections: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """One ``[sum of out, in]`` weight and its bias or None; each projection keeps a view of its rows, so no weight is held twice."""
    weight = torch.cat([p.weight.data for p in projections])
    bias = None if projections[0].bias is None else torch.cat([p.bias.data for p in projections])
    start = 0
    for projection in projections:
        rows = slice(start, start + projection.weight.shape[0])
        projection.weight.data = weight[rows]
        if bias is not None:
            projection.bias.data = bias[rows]
        start = rows.stop
    return weight, bias


class FeedForward(Protocol):
    """What follows attention in a layer. Both ways add to ``x [N, H]`` in place and return the norm ``after`` it, ``[N, H]``, from ``normed [N, H]``.

    In the narrow way both norms are unscaled, with the sums of squares in ``fast.work``.
    """

    def narrow(self, fast: FastForward, x: Tensor, normed: Tensor, after: Tensor) -> Tensor: ...

    def wide(self, fast: FastForward, x: Tensor, normed: Tensor, after: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """``down(silu(gate x) * up x)``: ``gate_up [2 m, H]``, ``down [H, m]``."""

    gate_up: Tensor
    down: Tensor

    @classmethod
    def of(cls, mlp: nn.Module) -> GatedMLP:
        """From ``gate_proj``, ``up_proj`` (fused from now on) and ``down_proj``."""
        return cls(fuse_rows([mlp.gate_proj, mlp.up_proj])[0], mlp.down_proj.weight)

    def inner_narrow(self, fast: FastForward, normed: Tensor) -> Tensor:
        """``silu(gate x) * up x`` of an unscaled norm, ``[N, m]``."""
        hidden, plan = (
            normed.new_empty(len(normed), self.down.shape[1]),
            fast.plan(len(normed), self.gate_up, gated=True),
        )
        return fast.product(normed, self.gate_up, hidden, plan=plan, gated=True, scale_eps=fast.eps)

    def inner_wide(self, fast: FastForward, normed: Tensor) -> Tensor:
        return ops.silu_mul(F.linear(normed, self.gate_up), overlap=fast.overlap)

    def narrow(self, fast: FastForward, x: Tensor, normed: Tensor, after: Tensor) -> Tensor:
        fast.product(self.inner_narrow(fast, normed), self.down, x, residual=ops.Norm(after, normed))
        return normed

    def wide(self, fast: FastForward, x: Tensor, normed: Tensor, after: Tensor) -> Tensor:
        out = F.linear(self.inner_wide(fast, normed), self.down)
        return ops.add_rms_norm(x, out, after, fast.eps, overlap=fast.overlap)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights as the kernels want them: ``between`` is the norm weight after attention, ``after`` the one that follows the layer."""

    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    qk_norm: ops.QKNorm
    between: Tensor
    mlp: FeedForward
    after: Tensor


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one forward, as both ways need them."""

    input_ids: Tensor
    positions: Tensor
    places: list[ops.Place]
    mask: Tensor | None
    logits_at: Tensor | None
    logit_rows: int


class FastForward:
    """``fast(input_ids, position_ids, cache, rows, prefixes, local_mask) -> logits``. The model it is made from keeps working."""

    family: str

    @staticmethod
    def refuses(config) -> str | None:
        """Why this family's kernels cannot serve a model of ``config``, or None."""
        return None

    def rotary_dim(self) -> int:
        """How many channels of a head are rotated."""
        return self.model.config.head_dim

    def embedding(self) -> Tensor:
        """``[V, H]``"""
        return self.model.model.embed_tokens.weight

    def first_projection(self, block: nn.Module) -> nn.Linear:
        """The projection whose weight begins a block's `Layer.qkv`."""
        return block.self_attn.q_proj

    def qk_norms(self, block: nn.Module) -> tuple[Tensor | None, Tensor | None]:
        """The norm weights of a block's queries and keys (None: no norm)."""
        return None, None

    def layer(self, block: nn.Module, cos_sin: list[Tensor], after: Tensor) -> Layer:
        """The weights of ``block``, by the names that Llama and Qwen gave them; ``cos_sin`` are the tables `ops.QKNorm` wants."""
        attention = block.self_attn
        qkv, bias = fuse_rows([attention.q_proj, attention.k_proj, attention.v_proj])
        return Layer(
            qkv=qkv,
            qkv_bias=bias,
            out=attention.o_proj.weight,
            out_bias=attention.o_proj.bias,
            qk_norm=ops.QKNorm(*self.qk_norms(block), *cos_sin, self.eps),
            between=block.post_attention_layernorm.weight,
            mlp=GatedMLP.of(block.mlp),
            after=after,
        )

    def __init__(self, model: CheckpointModel, overlap: bool | None = None):
        """``overlap``: let each kernel start before the one ahead has finished (default: where the device can)."""
        if reason := self.unsupported(model):
            raise UserError(f"the fast forward of {self.family} cannot be used: {reason}")
        config = model.config
        self.model, self.eps = model, config.rms_norm_eps
        self.overlap = ops.overlapping_launch(model.device) if overlap is None else overlap
        self.heads = ops.Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.work, self.plan = ops.Workspace(model.device), ops.narrow_plan
        positions, width = torch.arange(config.max_position_embeddings, device=model.device)[None], self.rotary_dim()
        tables = rotary_tables(positions, width, config.rope_theta, model.dtype)
        cos_sin = [table[0, 0, :, : width // 2].contiguous() for table in tables]
        blocks = model.model.layers
        following = [block.input_layernorm.weight for block in blocks[1:]] + [model.model.norm.weight]
        self.layers = [self.layer(block, cos_sin, after) for block, after in zip(blocks, following, strict=True)]
        self._where = self._weights_at()

    @classmethod
    def unsupported(cls, model: CheckpointModel) -> str | None:
        """Why the fast forward cannot serve ``model``, or None."""
        if getattr(model, "group", None) is not None:
            return "its kernels do not add up over processes, and the model is spread over several"
        if not ops.available(model.device):
            return "it needs a CUDA device and triton"
        if model.dtype not in (torch.bfloat16, torch.float32):
            return f"its kernels take bfloat16 and float32, the model is {model.dtype}"
        if model.config.head_dim not in (16, 32, 64, 128):
            return f"head_dim {model.config.head_dim} is not one of 16, 32, 64, 128"
        return cls.refuses(model.config)

    @classmethod
    def of(cls, model: CheckpointModel, required: bool) -> FastForward | None:
        """The fast forward over ``model``'s weights, made once; None where it cannot run (`UserError` with the reason if ``required``)."""
        if cls.unsupported(model) is not None and not required:
            return None
        last: FastForward | None = getattr(model, "last_fast", None)
        if last is None or not last.current():
            model.last_fast = last = cls(model)
        return last

    def current(self) -> bool:
        """Do the fused weights still belong to the model, or has it been moved or cast since?"""
        return self._where == self._weights_at()

    def _weights_at(self) -> list[tuple[int, torch.dtype]]:
        """Address and type of a weight of every layer."""
        weights = [self.first_projection(block).weight for block in self.model.model.layers]
        return [(weight.data_ptr(), weight.dtype) for weight in weights]

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cache: BlockCache,
        rows: Tensor,
        prefixes: Tensor,
        local_mask: Tensor | None = None,
        *,
        logit_rows: int | None = None,
        logits_at: slice | Tensor | None = None,
        offsets: Tensor | None = None,
        width: int = 0,
    ) -> Tensor:
        """Logits ``[logit_rows, T, V]`` (or ``[logit_rows, P, V]``) of ``input_ids [b, T]`` at ``position_ids [b, T]``.

        Entry ``i`` belongs to cache row ``rows[i]`` (on the device; -1 is padding: nothing is written and the logits mean nothing). It writes at
        ``[prefixes[i], prefixes[i] + T)`` and attends to ``[0, prefixes[i])`` and to its own tokens under ``local_mask`` (bool ``[T, T]`` or
        ``[b, T, T]``; None: all see all). With ``offsets [b]`` it writes that much further on and attends to the ``width`` slots from its prefix
        on, under ``local_mask [T, width]`` (or ``[b, T, width]``): a `Window` that is not plain. Only the ``logit_rows`` first entries (default: all) get
        logits; in every layer the others write before the logit_rows ones look, so a logit_rows entry's prefix may reach over what another entry of
        its row is writing. The caller keeps every write within the cache and every position below ``max_position_embeddings``.
        ``logits_at``: a slice of T or indices ``[logit_rows, P]``.
        """
        batch, tokens = input_ids.shape
        logit_rows = batch if logit_rows is None else logit_rows
        if isinstance(logits_at, slice):
            logits_at = torch.arange(tokens, device=input_ids.device)[logits_at].expand(logit_rows, -1)
        logits_at = None if logits_at is None else logits_at.contiguous()
        stores = zip(cache.keys, cache.values, strict=True)
        places = [ops.Place(keys, values, prefixes, rows, offsets, width) for keys, values in stores]
        call = _Call(input_ids, position_ids.contiguous(), places, local_mask, logits_at, logit_rows)
        wanted = logit_rows * tokens if logits_at is None else logits_at.numel()
        narrow = max(batch * tokens, wanted) <= ops.NARROW_TOKENS
        with on_device(input_ids.device):
            logits = (self._narrow if narrow else self._wide)(call)
        return logits.view(
            logit_rows, tokens if logits_at is None else logits_at.shape[1], self.model.config.vocab_size
        )

    def product(
        self, x: Tensor, weight: Tensor, out: Tensor, *, plan: ops.Plan | None = None, tokens: int | None = None, **how
    ) -> Tensor:
        """`ops.narrow_matmul` with the plan for ``tokens`` (default: the rows of x) and this forward's scratch memory."""
        plan = plan or self.plan(len(x) if tokens is None else tokens, weight)
        return ops.narrow_matmul(x, weight, out, plan, self.work, overlap=self.overlap, **how)

    def _narrow(self, call: _Call) -> Tensor:
        """At most `ops.NARROW_TOKENS` tokens: what stands between two matrix products happens in one of them."""
        count, head, scaled = call.input_ids.numel(), self.model.lm_head.weight, {"scale_eps": self.eps}
        normed, qkv = head.new_empty(count, head.shape[1]), head.new_empty(count, self.heads.width)
        norm = ops.Norm(self.model.model.layers[0].input_layernorm.weight, normed)
        x = ops.embed(call.input_ids.reshape(-1), self.embedding(), norm, self.work, overlap=self.overlap)
        for layer, place in zip(self.layers, call.places, strict=True):
            self.product(normed, layer.qkv, qkv, bias=layer.qkv_bias, **scaled)
            attended = self._attend_split(qkv, call, place, layer.qk_norm)
            between = ops.Norm(layer.between, normed)
            self.product(attended, layer.out, x, bias=layer.out_bias, residual=between)
            normed = layer.mlp.narrow(self, x, normed, layer.after)
        wanted = call.logit_rows * call.input_ids.shape[1] if call.logits_at is None else call.logits_at.numel()
        logits = head.new_empty(wanted, head.shape[0])
        if not wanted:
            return logits
        picks = {"picked": call.logits_at, "tokens_per_row": call.input_ids.shape[1]}
        return self.product(normed, head, logits, tokens=count, **picks, **scaled)

    def _wide(self, call: _Call) -> Tensor:
        """Many tokens: cuBLAS products, one kernel for each step between them."""
        tokens, step = call.input_ids.shape[1], {"eps": self.eps, "overlap": self.overlap}
        x = F.embedding(call.input_ids.reshape(-1), self.embedding())
        normed = ops.add_rms_norm(x, None, self.model.model.layers[0].input_layernorm.weight, self.eps)
        extents = None
        if tokens > ops.SPLIT_TOKENS and call.mask is not None:
            extents = ops.long_extents(call.mask, x.dtype)
        for layer, place in zip(self.layers, call.places, strict=True):
            qkv = F.linear(normed, layer.qkv, layer.qkv_bias)
            attended = self._attend_wide(qkv, call, place, layer.qk_norm, extents)
            normed = ops.add_rms_norm(x, F.linear(attended, layer.out, layer.out_bias), layer.between, **step)
            normed = layer.mlp.wide(self, x, normed, layer.after)
        normed = normed[: call.logit_rows * tokens]
        if call.logits_at is not None:
            row_start = torch.arange(call.logit_rows, device=x.device)[:, None] * tokens
            normed = normed[(row_start + call.logits_at).reshape(-1)]
        return self.model.lm_head(normed)

    def _attend_wide(self, qkv: Tensor, call: _Call, place: ops.Place, norm: ops.QKNorm, extents) -> Tensor:
        batch, tokens = call.positions.shape
        if tokens <= ops.SPLIT_TOKENS:
            return self._attend_split(qkv, call, place, norm)
        ops.rope_write(qkv, call.positions, place, self.heads, norm)
        return ops.attend_long(qkv, place, self.heads, batch, call.mask, extents)

    def _attend_split(self, qkv: Tensor, call: _Call, place: ops.Place, norm: ops.QKNorm) -> Tensor:
        """The entries after the logit_rows ones go first: what they write may lie in a logit_rows entry's prefix."""
        batch, tokens = call.positions.shape
        out = qkv.new_empty(batch * tokens, self.heads.query * self.heads.dim)
        for first, last in ((call.logit_rows, batch), (0, call.logit_rows)):
            if first < last:
                part, flat = slice(first, last), slice(first * tokens, last * tokens)
                mask = call.mask if call.mask is None or call.mask.dim() == 2 else call.mask[part]
                offsets = None if place.offsets is None else place.offsets[part]
                here = replace(place, prefixes=place.prefixes[part], rows=place.rows[part], offsets=offsets)
                positions, how = call.positions[part], {"overlap": self.overlap, "out": out[flat]}
                ops.attend_split(qkv[flat], positions, here, self.heads, norm, mask, **how)
        return out


def fast_forward_of(model, required=False):
    return model.fast(required=required)
