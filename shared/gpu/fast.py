"""The fast forward of a decoder network on a GPU, through the kernels of this room.

Same weights, same numbers up to rounding, no host read, and therefore fit for CUDA graphs. There are two ways through a layer. A small batch, of at most
`SMALL_BATCH_TOKENS` tokens, is bound by reading the weights: no kernel is elementwise (see `shared.gpu.matmul`). A large batch leaves the matrix products to
cuBLAS, with elementwise kernels between them (`shared.gpu.norm`). `FastForward` serves networks that name their parts as Llama and Qwen do; a family
whose network differs subclasses it and names the subclass in its model's ``fast_class``.

    fast = fast_forward_of(model, required=True)
    cache = model.new_cache(rows=4, slots=2048)
    window = cache.window(16, rows=[0, 2])
    logits = fast(input_ids, position_ids, cache, window.where.rows, window.prefix, local_mask)      # nothing is committed
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import UserError
from shared.gpu.attention import SPLIT_TOKENS, attend_long, attend_split, long_extents
from shared.gpu.graphs import on_device
from shared.gpu.launch import SMALL_BATCH_TOKENS, Workspace, available, overlapping_launch
from shared.gpu.matmul import Plan, small_batch_matmul, small_batch_plan
from shared.gpu.norm import Norm, add_rms_norm, embed, silu_mul
from shared.gpu.rope import Heads, LayerWindow, QKNorm, rope_write
from shared.network.features import Features
from shared.network.kv_cache import BlockCache
from shared.network.loading import CheckpointModel


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

    In a small batch neither norm has been divided by its rms yet; the sums of squares are in ``fast.work``.
    """

    def small_batch(self, fast: FastForward, x: Tensor, normed: Tensor, after: Tensor) -> Tensor: ...

    def large_batch(self, fast: FastForward, x: Tensor, normed: Tensor, after: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """``down(silu(gate x) * up x)``: ``gate_up [2 m, H]``, ``down [H, m]``."""

    gate_up: Tensor
    down: Tensor

    @classmethod
    def of(cls, mlp: nn.Module) -> GatedMLP:
        """From ``gate_proj``, ``up_proj`` (fused from now on) and ``down_proj``."""
        return cls(fuse_rows([mlp.gate_proj, mlp.up_proj])[0], mlp.down_proj.weight)

    def inner_small_batch(self, fast: FastForward, normed: Tensor) -> Tensor:
        """``silu(gate x) * up x [N, m]`` of a norm that has not been divided yet."""
        inner = normed.new_empty(len(normed), self.down.shape[1])
        plan = fast.plan(len(normed), self.gate_up, gated=True)
        return fast.product(normed, self.gate_up, inner, plan=plan, gated=True, scale_eps=fast.eps)

    def inner_large_batch(self, fast: FastForward, normed: Tensor) -> Tensor:
        return silu_mul(F.linear(normed, self.gate_up), overlap=fast.overlap)

    def small_batch(self, fast: FastForward, x: Tensor, normed: Tensor, after: Tensor) -> Tensor:
        fast.product(self.inner_small_batch(fast, normed), self.down, x, residual=Norm(after, normed))
        return normed

    def large_batch(self, fast: FastForward, x: Tensor, normed: Tensor, after: Tensor) -> Tensor:
        out = F.linear(self.inner_large_batch(fast, normed), self.down)
        return add_rms_norm(x, out, after, fast.eps, overlap=fast.overlap)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights as the kernels want them: ``between`` is the norm weight after attention, ``after`` the one that follows the layer."""

    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    qk_norm: QKNorm
    between: Tensor
    mlp: FeedForward
    after: Tensor


def norm_weight(norm: nn.Module | None) -> Tensor | None:
    """The weight of a norm that a network may lack."""
    return None if norm is None else norm.weight


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one forward, as both ways need them."""

    input_ids: Tensor
    positions: Tensor
    windows: list[LayerWindow]
    mask: Tensor | None
    logits_at: Tensor | None
    logit_rows: int
    features: Features | None

    @property
    def logit_count(self) -> int:
        """Positions that get logits."""
        return self.logit_rows * self.input_ids.shape[1] if self.logits_at is None else self.logits_at.numel()


class FastForward:
    """``fast(input_ids, position_ids, cache, rows, prefixes, local_mask) -> logits``. The model it is made from keeps working."""

    @staticmethod
    def refuses(config) -> str | None:
        """Why this class's kernels cannot serve a model of ``config``, or None."""
        return None

    def embedding(self) -> Tensor:
        """``[V, H]``"""
        return self.model.model.embed_tokens.weight

    def first_projection(self, block: nn.Module) -> nn.Linear:
        """The projection whose weight begins a block's `Layer.qkv`."""
        return block.self_attn.q_proj

    def layer(self, block: nn.Module, cos_sin: list[Tensor], after: Tensor) -> Layer:
        """The weights of ``block``, by the names that Llama and Qwen gave them; ``cos_sin`` are the tables `QKNorm` wants."""
        attention = block.self_attn
        qk_norms = [norm_weight(getattr(attention, name, None)) for name in ("q_norm", "k_norm")]
        qkv, bias = fuse_rows([attention.q_proj, attention.k_proj, attention.v_proj])
        return Layer(
            qkv=qkv,
            qkv_bias=bias,
            out=attention.o_proj.weight,
            out_bias=attention.o_proj.bias,
            qk_norm=QKNorm(*qk_norms, *cos_sin, self.eps),
            between=block.post_attention_layernorm.weight,
            mlp=GatedMLP.of(block.mlp),
            after=after,
        )

    def __init__(self, model: CheckpointModel, overlap: bool | None = None):
        """``overlap``: let each kernel start before the one ahead has finished (default: where the device can)."""
        if reason := self.unsupported(model):
            raise UserError(f"the fast forward of {type(model).__name__} cannot be used: {reason}")
        config = model.config
        self.model, self.eps = model, config.rms_norm_eps
        self.overlap = overlapping_launch(model.device) if overlap is None else overlap
        self.heads = Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.work, self.plan = Workspace(model.device), small_batch_plan
        positions = torch.arange(config.max_position_embeddings, device=model.device)[None]
        tables = model.rotary.tables(positions, model.dtype)
        cos_sin = [table[0, 0, :, : model.rotary.dim // 2].contiguous() for table in tables]
        blocks = model.model.layers
        following = [block.input_layernorm.weight for block in blocks[1:]] + [model.model.norm.weight]
        self.layers = [self.layer(block, cos_sin, after) for block, after in zip(blocks, following, strict=True)]
        self._where = self._weights_at()

    @classmethod
    def unsupported(cls, model: CheckpointModel) -> str | None:
        """Why the fast forward cannot serve ``model``, or None."""
        if getattr(model, "group", None) is not None:
            return "its kernels do not add up over processes, and the model is spread over several"
        if not available(model.device):
            return "it needs a CUDA device and triton"
        if model.dtype not in (torch.bfloat16, torch.float32):
            return f"its kernels take bfloat16 and float32, the model is {model.dtype}"
        if model.config.head_dim not in (16, 32, 64, 128):
            return f"head_dim {model.config.head_dim} is not one of 16, 32, 64, 128"
        if model.switches(model.config).mlp_bias:
            return "its kernels have no bias in the feed-forward"
        if getattr(model.config, "scale_logits", False):
            return "its kernels do not scale logits"
        return cls.refuses(model.config)

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
        write_rows: Tensor | None = None,
        features: Features | None = None,
    ) -> Tensor:
        """Logits ``[logit_rows, T, V]`` (or ``[logit_rows, P, V]``) of ``input_ids [b, T]`` at ``position_ids [b, T]``.

        Entry ``i`` reads the prefix ``[0, prefixes[i])`` of cache row ``rows[i]`` (on the device; -1 is padding: nothing is written and the logits mean
        nothing). It writes at ``[prefixes[i], prefixes[i] + T)`` of row ``write_rows[i]`` (None: the row it reads) and attends to its prefix and to its own
        tokens under ``local_mask`` (bool ``[T, T]`` or ``[b, T, T]``; None: all see all). With ``offsets [b]`` it writes that much further on and attends to
        the ``width`` slots from its prefix on in the row it writes, under ``local_mask [T, width]`` (or ``[b, T, width]``): a `Window` that is not plain.

        The ``logit_rows`` first entries (default: all) return logits, the others only write keys and values. In every layer those others write first, so the
        prefix of an entry that returns logits may reach over what another entry is writing to that row. The caller keeps every write within the cache and
        every position below ``max_position_embeddings``. ``logits_at``: a slice of T or indices ``[logit_rows, P]``. ``features`` takes the outputs of layers.
        """
        batch, tokens = input_ids.shape
        logit_rows = batch if logit_rows is None else logit_rows
        if isinstance(logits_at, slice):
            logits_at = torch.arange(tokens, device=input_ids.device)[logits_at].expand(logit_rows, -1)
        logits_at = None if logits_at is None else logits_at.contiguous()
        stores = zip(cache.keys, cache.values, strict=True)
        windows = [LayerWindow(*store, prefixes, rows, offsets, width, write_rows) for store in stores]
        call = _Call(input_ids, position_ids.contiguous(), windows, local_mask, logits_at, logit_rows, features)
        small = max(batch * tokens, call.logit_count) <= SMALL_BATCH_TOKENS
        with on_device(input_ids.device):
            logits = (self._small_batch if small else self._large_batch)(call)
        return logits.view(
            logit_rows, tokens if logits_at is None else logits_at.shape[1], self.model.config.vocab_size
        )

    def product(
        self, x: Tensor, weight: Tensor, out: Tensor, *, plan: Plan | None = None, tokens: int | None = None, **how
    ) -> Tensor:
        """`small_batch_matmul` with the plan for ``tokens`` (default: the rows of x) and this forward's scratch memory."""
        plan = plan or self.plan(len(x) if tokens is None else tokens, weight)
        return small_batch_matmul(x, weight, out, plan, self.work, overlap=self.overlap, **how)

    def _layers(self, call: _Call, x: Tensor) -> Iterator[tuple[Layer, LayerWindow]]:
        """Every layer with its window; between them, the residual stream ``x`` is what the layer before has made of it."""
        if call.features is not None:
            call.features.start(len(self.layers))
        for number, (layer, window) in enumerate(zip(self.layers, call.windows, strict=True)):
            yield layer, window
            if call.features is not None:
                call.features.take(number, x.view(*call.input_ids.shape, -1))

    def _small_batch(self, call: _Call) -> Tensor:
        """What stands between two matrix products happens in one of them."""
        count, head, scaled = call.input_ids.numel(), self.model.lm_head.weight, {"scale_eps": self.eps}
        normed, qkv = head.new_empty(count, head.shape[1]), head.new_empty(count, self.heads.width)
        norm = Norm(self.model.model.layers[0].input_layernorm.weight, normed)
        x = embed(call.input_ids.reshape(-1), self.embedding(), norm, self.work, overlap=self.overlap)
        for layer, window in self._layers(call, x):
            self.product(normed, layer.qkv, qkv, bias=layer.qkv_bias, **scaled)
            attended = self._attend_split(qkv, call, window, layer.qk_norm)
            between = Norm(layer.between, normed)
            self.product(attended, layer.out, x, bias=layer.out_bias, residual=between)
            normed = layer.mlp.small_batch(self, x, normed, layer.after)
        logits = head.new_empty(call.logit_count, head.shape[0])
        if not call.logit_count:
            return logits
        picks = {"picked": call.logits_at, "tokens_per_row": call.input_ids.shape[1]}
        return self.product(normed, head, logits, tokens=count, **picks, **scaled)

    def _large_batch(self, call: _Call) -> Tensor:
        """cuBLAS products, one kernel for each step between them."""
        tokens, step = call.input_ids.shape[1], {"eps": self.eps, "overlap": self.overlap}
        x = F.embedding(call.input_ids.reshape(-1), self.embedding())
        normed = add_rms_norm(x, None, self.model.model.layers[0].input_layernorm.weight, self.eps)
        extents = None
        if tokens > SPLIT_TOKENS and call.mask is not None:
            extents = long_extents(call.mask, x.dtype)
        for layer, window in self._layers(call, x):
            qkv = F.linear(normed, layer.qkv, layer.qkv_bias)
            attended = self._attend(qkv, call, window, layer.qk_norm, extents)
            normed = add_rms_norm(x, F.linear(attended, layer.out, layer.out_bias), layer.between, **step)
            normed = layer.mlp.large_batch(self, x, normed, layer.after)
        normed = normed[: call.logit_rows * tokens]
        if call.logits_at is not None:
            row_start = torch.arange(call.logit_rows, device=x.device)[:, None] * tokens
            normed = normed[(row_start + call.logits_at).reshape(-1)]
        return self.model.lm_head(normed)

    def _attend(self, qkv: Tensor, call: _Call, window: LayerWindow, norm: QKNorm, extents: Tensor | None) -> Tensor:
        batch, tokens = call.positions.shape
        if tokens <= SPLIT_TOKENS:
            return self._attend_split(qkv, call, window, norm)
        rope_write(qkv, call.positions, window, self.heads, norm)
        return attend_long(qkv, window, self.heads, batch, call.mask, extents)

    def _attend_split(self, qkv: Tensor, call: _Call, window: LayerWindow, norm: QKNorm) -> Tensor:
        """Entries that only write go first: what they write may lie in the prefix of an entry that returns logits."""
        batch, tokens = call.positions.shape
        out = qkv.new_empty(batch * tokens, self.heads.query * self.heads.dim)
        for first, last in ((call.logit_rows, batch), (0, call.logit_rows)):
            if first < last:
                part, flat = slice(first, last), slice(first * tokens, last * tokens)
                mask = call.mask if call.mask is None or call.mask.dim() == 2 else call.mask[part]
                how = {"overlap": self.overlap, "out": out[flat]}
                attend_split(qkv[flat], call.positions[part], window.part(part), self.heads, norm, mask, **how)
        return out


def fast_forward_of(model: CheckpointModel, required: bool = False) -> FastForward | None:
    """The fast forward over ``model``'s weights, made once, and again when they have moved; None where it cannot run (`UserError` with the reason if
    ``required``).
    """
    module, name = model.fast_class.split(":")
    kind: type[FastForward] = getattr(import_module(module), name)
    if not required and kind.unsupported(model) is not None:
        return None
    if model.last_fast is None or not model.last_fast.current():
        model.last_fast = kind(model)
    return model.last_fast
