"""The fast forward of SDAR on a GPU: the network of `modeling_sdar` through the kernels of `shared.triton_ops`.

Same weights, same numbers up to rounding, no host read, and therefore fit for CUDA graphs. Few tokens take the narrow
way (six launches a layer, no elementwise kernel), many take the wide way (cuBLAS and elementwise kernels).

    fast = FastSDAR(model)
    cache = model.new_cache(rows=4, slots=2048)
    logits = fast(input_ids, position_ids, cache, rows, local_mask)      # nothing is committed
    runner = fast.runner(cache)                                          # the same forward as CUDA graphs
    runner.capture([Shape(1, 16, 1024), Shape(4, 16, 1024), Shape(1, 32, 1024, picks=16)])
    logits = runner(input_ids, position_ids, rows, local_mask, slots=max(cache.lengths))
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdar.modeling_sdar import SDARForCausalLM
from shared import triton_ops as ops
from shared.errors import UserError
from shared.kv_cache import BlockCache
from shared.rotary import rotary_tables


def unsupported(model: SDARForCausalLM) -> str | None:
    """Why the fast forward cannot serve ``model``, or None."""
    config = model.config
    if getattr(model, "group", None) is not None:
        return "its kernels do not add up over processes, and the model is spread over several"
    if not ops.available(model.device):
        return "it needs a CUDA device and triton"
    if model.dtype not in (torch.bfloat16, torch.float32):
        return f"its kernels take bfloat16 and float32, the model is {model.dtype}"
    if config.attention_bias:
        return "attention_bias is set"
    if config.head_dim not in (16, 32, 64, 128):
        return f"head_dim {config.head_dim} is not one of 16, 32, 64, 128"
    return None


def fuse_rows(projections: list[nn.Linear]) -> Tensor:
    """One ``[sum of out, in]`` weight; each projection keeps a view of its rows, so no weight is held twice."""
    fused = torch.cat([p.weight.data for p in projections])
    start = 0
    for projection in projections:
        rows = projection.weight.shape[0]
        projection.weight.data = fused[start : start + rows]
        start += rows
    return fused


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's weights as the kernels want them; ``after`` is the norm weight that follows the layer."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    between: Tensor
    after: Tensor
    qk_norm: ops.QKNorm


class FastSDAR:
    """``fast(input_ids, position_ids, cache, rows, local_mask) -> logits``. The model it is made from keeps working."""

    def __init__(self, model: SDARForCausalLM, overlap: bool | None = None):
        """``overlap``: let each kernel start before the one ahead has finished (default: where the device can)."""
        if reason := unsupported(model):
            raise UserError(f"the fast forward of SDAR cannot be used: {reason}")
        config = model.config
        self.model, self.eps = model, config.rms_norm_eps
        self.overlap = ops.overlapping_launch(model.device) if overlap is None else overlap
        self.heads = ops.Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.work = ops.Workspace(model.device)
        self.plan = ops.narrow_plan
        positions = torch.arange(config.max_position_embeddings, device=model.device)[None]
        tables = rotary_tables(positions, config.head_dim, config.rope_theta, model.dtype)
        cos_sin = [table[0, 0, :, : config.head_dim // 2].contiguous() for table in tables]
        following = [layer.input_layernorm.weight for layer in model.model.layers[1:]] + [model.model.norm.weight]
        self.layers = [
            self._fuse(layer, after, cos_sin) for layer, after in zip(model.model.layers, following, strict=True)
        ]

    def _fuse(self, layer: nn.Module, after: Tensor, cos_sin: list[Tensor]) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return _Layer(
            qkv=fuse_rows([attention.q_proj, attention.k_proj, attention.v_proj]),
            out=attention.o_proj.weight,
            gate_up=fuse_rows([mlp.gate_proj, mlp.up_proj]),
            down=mlp.down_proj.weight,
            between=layer.post_attention_layernorm.weight,
            after=after,
            qk_norm=ops.QKNorm(attention.q_norm.weight, attention.k_norm.weight, *cos_sin, self.eps),
        )

    def current(self) -> bool:
        """Do the fused weights still belong to the model, or has it been moved or cast since?"""
        attention = [layer.self_attn.q_proj.weight for layer in self.model.model.layers]
        return all(
            w.data_ptr() == f.qkv.data_ptr() and w.dtype == f.qkv.dtype
            for w, f in zip(attention, self.layers, strict=True)
        )

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
        leading: int | None = None,
        logits_at: slice | Tensor | None = None,
    ) -> Tensor:
        """Logits ``[leading, T, V]`` (or ``[leading, P, V]``) of ``input_ids [b, T]`` at ``position_ids [b, T]``.

        Entry ``i`` belongs to cache row ``rows[i]`` (on the device; -1 is padding: nothing is written and the logits mean nothing). It writes at
        ``[prefixes[i], prefixes[i] + T)`` and attends to ``[0, prefixes[i])`` and to its own tokens under ``local_mask`` (bool ``[T, T]`` or
        ``[b, T, T]``; None: all see all). Only the ``leading`` first entries (default: all) get logits; in every layer the others write before
        the leading ones look, so a leading entry's prefix may reach over what another entry of its row is writing. The caller keeps every
        write within the cache and every position below ``max_position_embeddings``.
        ``logits_at``: a slice of T or indices ``[leading, P]``.
        """
        batch, tokens = input_ids.shape
        leading = batch if leading is None else leading
        if isinstance(logits_at, slice):
            logits_at = torch.arange(tokens, device=input_ids.device)[logits_at].expand(leading, -1)
        logits_at = None if logits_at is None else logits_at.contiguous()
        places = [
            ops.Place(keys, values, prefixes, rows) for keys, values in zip(cache.keys, cache.values, strict=True)
        ]
        forward = self._narrow if batch * tokens <= ops.NARROW_TOKENS else self._wide
        logits = forward(input_ids, position_ids.contiguous(), places, local_mask, logits_at, leading)
        return logits.view(leading, tokens if logits_at is None else logits_at.shape[1], self.model.config.vocab_size)

    def _narrow(self, input_ids, positions, places, local_mask, logits_at, leading) -> Tensor:
        """At most `ops.NARROW_TOKENS` tokens: what stands between two matrix products happens in one of them."""
        network, work, overlap, first = self.model.model, self.work, self.overlap, self.layers[0]
        count, head = input_ids.numel(), self.model.lm_head.weight
        qkv_plan, out_plan = self.plan(count, first.qkv), self.plan(count, first.out)
        gate_up_plan, down_plan = self.plan(count, first.gate_up, gated=True), self.plan(count, first.down)
        normed, qkv = head.new_empty(count, head.shape[1]), head.new_empty(count, self.heads.width)
        hidden = head.new_empty(count, first.down.shape[1])
        scaled = {"scale_eps": self.eps, "overlap": overlap}
        norm = ops.Norm(network.layers[0].input_layernorm.weight, normed)
        x = ops.embed(input_ids.reshape(-1), network.embed_tokens.weight, norm, work, overlap=overlap)
        for layer, place in zip(self.layers, places, strict=True):
            between, after = ops.Norm(layer.between, normed), ops.Norm(layer.after, normed)
            ops.narrow_matmul(normed, layer.qkv, qkv, qkv_plan, work, **scaled)
            attended = self._attend_split(qkv, positions, place, layer.qk_norm, local_mask, leading)
            ops.narrow_matmul(attended, layer.out, x, out_plan, work, residual=between, overlap=overlap)
            ops.narrow_matmul(normed, layer.gate_up, hidden, gate_up_plan, work, gated=True, **scaled)
            ops.narrow_matmul(hidden, layer.down, x, down_plan, work, residual=after, overlap=overlap)
        picks = {"picked": logits_at, "tokens_per_row": input_ids.shape[1]}
        wanted = leading * input_ids.shape[1] if logits_at is None else logits_at.numel()
        logits = head.new_empty(wanted, head.shape[0])
        if not wanted:
            return logits
        return ops.narrow_matmul(normed, head, logits, self.plan(count, head), work, **picks, **scaled)

    def _wide(self, input_ids, positions, places, local_mask, logits_at, leading) -> Tensor:
        """Many tokens: cuBLAS products, one kernel for each step between them."""
        network, tokens = self.model.model, input_ids.shape[1]
        x = F.embedding(input_ids.reshape(-1), network.embed_tokens.weight)
        normed = ops.add_rms_norm(x, None, network.layers[0].input_layernorm.weight, self.eps)
        extents = None
        if tokens > ops.SPLIT_TOKENS and local_mask is not None:
            extents = ops.long_extents(local_mask, x.dtype)
        for layer, place in zip(self.layers, places, strict=True):
            qkv = F.linear(normed, layer.qkv)
            attended = self._attend_wide(qkv, positions, place, layer.qk_norm, local_mask, extents, leading)
            step = {"eps": self.eps, "overlap": self.overlap}
            normed = ops.add_rms_norm(x, F.linear(attended, layer.out), layer.between, **step)
            hidden = ops.silu_mul(F.linear(normed, layer.gate_up), overlap=self.overlap)
            normed = ops.add_rms_norm(x, F.linear(hidden, layer.down), layer.after, **step)
        normed = normed[: leading * tokens]
        if logits_at is not None:
            row_start = torch.arange(leading, device=x.device)[:, None] * tokens
            normed = normed[(row_start + logits_at).reshape(-1)]
        return self.model.lm_head(normed)

    def _attend_wide(self, qkv, positions, place, norm, local_mask, extents, leading) -> Tensor:
        batch, tokens = positions.shape
        if tokens <= ops.SPLIT_TOKENS:
            return self._attend_split(qkv, positions, place, norm, local_mask, leading)
        ops.rope_write(qkv, positions, place, self.heads, norm)
        return ops.attend_long(qkv, place, self.heads, batch, local_mask, extents)

    def _attend_split(self, qkv, positions, place, norm, local_mask, leading) -> Tensor:
        """The entries after the leading ones go first: what they write may lie in a leading entry's prefix."""
        batch, tokens = positions.shape
        out = qkv.new_empty(batch * tokens, self.heads.query * self.heads.dim)
        for first, last in ((leading, batch), (0, leading)):
            if first < last:
                part, flat = slice(first, last), slice(first * tokens, last * tokens)
                mask = local_mask if local_mask is None or local_mask.dim() == 2 else local_mask[part]
                here = replace(place, prefixes=place.prefixes[part], rows=place.rows[part])
                ops.attend_split(
                    qkv[flat], positions[part], here, self.heads, norm, mask, overlap=self.overlap, out=out[flat]
                )
        return out
