"""What the benchmark knows of each family: its network, its decoders, the shapes of released checkpoints, and the forwards its decoders ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.families import FAMILIES, Family, family_of_checkpoint
from shared.errors import UserError
from shared.gpu.graphs import Shape
from shared.network import masks

_QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "rope_theta": 1e6, "mask_token_id": 151669}
_QWEN2 = {"num_hidden_layers": 28, "rope_theta": 1e6}
# name: (family, configuration)
SHAPES = {
    "sdar-1.7b": ("SDAR", {**_QWEN3, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}),
    "sdar-4b": ("SDAR", {**_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}),
    "sdar-8b": ("SDAR", {**_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}),
    "fast-dllm-v2-1.5b": ("Fast-dLLM-v2", {
        **_QWEN2, "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }),
    "fast-dllm-v2-7b": ("Fast-dLLM-v2", {
        **_QWEN2, "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
    }),
    "llada2-mini": ("LLaDA2", {
        "head_dim": 128, "use_bias": False, "rms_norm_eps": 1e-6, "rope_theta": 6e5, "num_experts_per_tok": 8, "num_shared_experts": 1,
        "first_k_dense_replace": 1,
    }),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kind:
    """One forward of an entry: ``tokens`` of them under ``mask [tokens, width]``, logits of the rows ``picks`` (None: all).

    ``commit_rows``: as many entries commit the block before. ``offset`` and ``width`` place it in a window that is not plain.
    """

    name: str
    tokens: int
    mask: Tensor | None = None
    picks: Sequence[int] | None = None
    commit_rows: bool = False
    offset: int = 0
    width: int | None = None

    @property
    def logits(self) -> int:
        return self.tokens if self.picks is None else len(self.picks)


@dataclass(frozen=True, slots=True)
class Subject:
    """``plain`` and ``ssd_policy`` of ``family`` are timed. ``kinds(length, device)`` begins with the draft and the verify; ``graphs(length)``
    are the shapes its decoders have captured (None: those of the block length). ``lossless`` makes its speculation exact.
    """

    family: Family
    plain: str
    block_length: int
    kinds: Callable[[int, torch.device], list[Kind]]
    graphs: Callable[[int], list[Shape] | None]
    lossless: dict

    @property
    def plain_generate(self):
        return self.family.decoders[self.plain].generate

    @property
    def speculative_generate(self):
        return self.family.decoders["ssd_policy"].generate


def two_copy_kinds(length: int, device: torch.device) -> list[Kind]:
    """Drafts of a block, verifies of the block with a mask query for each token, and drafts with the last block's commit."""
    return [
        Kind("draft", length),
        Kind("verify", 2 * length, masks.two_copy_verify(length, device), range(length, 2 * length)),
        Kind("draft and commit", length, commit_rows=True),
    ]


def shifted_kinds(length: int, device: torch.device) -> list[Kind]:
    """Drafts of a small block in a forward over its block, causal verifies of the block, commits, and drafts beside a block cache."""
    small = _small(length)
    causal = masks.token_causal(length, device)
    return [
        Kind("draft", length, picks=range(small)),
        Kind("verify", length, causal, picks=range(length - small - 1, length)),
        Kind("commit", length, causal, picks=[length - 1]),
        Kind("draft with block cache", small, picks=range(small), offset=length - small, width=length),
    ]


def _small(length: int) -> int:
    """The small block the decoders of the shifted family take by default."""
    return 8 if length % 8 == 0 else length


def shifted_graphs(length: int) -> list[Shape]:
    from fast_dllm_v2.decoding import forward_kinds
    from fast_dllm_v2.options import Options

    blocks = {"block_length": length, "small_block_length": _small(length)}
    both = [forward_kinds(Options.from_flat({**blocks, "use_block_cache": cached})) for cached in (False, True)]
    return list(dict.fromkeys(both[0] + both[1]))


_EXACT = {"do_verify_policy": "always", "acceptance": "exact", "cache_ver": True, "draft_ver": True}
SUBJECTS = {
    "SDAR": Subject(FAMILIES["SDAR"], "standard", 16, two_copy_kinds, lambda length: None, _EXACT),
    "Fast-dLLM-v2": Subject(FAMILIES["Fast-dLLM-v2"], "fast", 32, shifted_kinds, shifted_graphs, _EXACT),
    "LLaDA2": Subject(
        FAMILIES["LLaDA2"], "cached", 32, two_copy_kinds, lambda length: None, {**_EXACT, "editing_threshold": 1.0}
    ),
}


def subject_of(family: str | None, shape: str | None, model: str | None) -> Subject:
    """The subject that ``shape`` or the checkpoint ``model`` belongs to, or the one named ``family`` (default: SDAR); `UserError` if they differ."""
    found = SHAPES[shape][0] if shape else None
    if model is not None:
        found = family_of_checkpoint(model)
    if family and found and family != found:
        raise UserError(f"family is {family!r}. Allowed with this shape or model: {found}")
    return SUBJECTS[found or family or "SDAR"]


def random_model(shape: str, device: torch.device, dtype: torch.dtype):
    """Random weights of a named shape, made on the device."""
    family, config = SHAPES[shape]
    kind = FAMILIES[family].model_class
    with torch.device("meta"):
        model = kind(kind.config_class(**config, max_position_embeddings=32768, eos_token_id=0))
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.fill_(1.0)
        else:
            weight.normal_(std=0.02)
    for buffer in model.buffers():
        buffer.zero_()
    return model
