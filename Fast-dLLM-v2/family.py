"""Fast-dLLM v2 as `shared.family` describes a family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.family import Decoder, DecoderSetting, Family, Network, Timed, Training

if TYPE_CHECKING:
    import torch

    from shared.gpu.graphs import Shape
    from shared.network.timed import Forward

_QWEN2 = {"num_hidden_layers": 28, "rope_theta": 1e6}

FAMILY = Family(
    name="Fast-dLLM-v2",
    package="fast_dllm_v2",
    networks={
        "model": Network(
            "fast_dllm_v2.modeling_fast:Fast_dLLM_QwenForCausalLM",
            "Fast_dLLM_Qwen",
            "shared.network.scoring:next_token_scores",
        )
    },
    decoders={
        "ssd_policy": Decoder(
            "fast_dllm_v2.generate_policy_utils:generate_ssd_policy",
            "fast_dllm_v2.options:Options",
            "fast_dllm_v2.options:PRESETS",
        ),
        "ssd": Decoder(
            "fast_dllm_v2.generate_utils:generate_ssd",
            "fast_dllm_v2.options:Options",
            "fast_dllm_v2.options:SSD_PRESETS",
        ),
        "fast": Decoder(
            "fast_dllm_v2.generate_utils:generate_fast",
            "fast_dllm_v2.options:StandardOptions",
            "fast_dllm_v2.options:PLAIN_PRESETS",
        ),
    },
    baseline=DecoderSetting("fast", {"block_length": 1, "small_block_length": 1}),
    plain=DecoderSetting("fast"),
    exact=DecoderSetting(
        "ssd_policy", {"do_verify_policy": "always", "acceptance": "exact", "cache_ver": True, "draft_ver": True}
    ),
    method="S2D2",
    shapes={
        "fast-dllm-v2-1.5b": {
            "model": {
                **_QWEN2,
                "vocab_size": 151936,
                "hidden_size": 1536,
                "intermediate_size": 8960,
                "num_attention_heads": 12,
                "num_key_value_heads": 2,
                "tie_word_embeddings": True,
            }
        },
        "fast-dllm-v2-7b": {
            "model": {
                **_QWEN2,
                "vocab_size": 152064,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
            }
        },
    },
    timed={"model": Timed("fast_dllm_v2.family:forwards", "fast_dllm_v2.family:kinds")},
    trains={
        "model": Training(
            "train.shifted_diffusion:objective", "shifted block diffusion", config={"rope_theta": 1e4, "bd_size": 32}
        )
    },
    shipped={"tiny": {"model": "tiny"}},
)


def _small(length: int) -> int:
    """The small block the decoders take by default."""
    return 8 if length % 8 == 0 else length


def kinds(length: int) -> list[Shape]:
    """What is captured for blocks of ``length``, with a block cache and without."""
    from fast_dllm_v2.decoding import forward_kinds
    from fast_dllm_v2.options import Options

    blocks = {"block_length": length, "small_block_length": _small(length)}
    both = [forward_kinds(Options.from_flat({**blocks, "use_block_cache": cached})) for cached in (False, True)]
    return list(dict.fromkeys(both[0] + both[1]))


def forwards(length: int, device: torch.device) -> list[Forward]:
    """Drafts of a small block in a forward over its block, causal verifies of the block, commits, and drafts beside a block cache."""
    from shared.network import masks
    from shared.network.timed import Forward

    small, causal = _small(length), masks.token_causal(length, device)
    return [
        Forward("draft", length, picks=range(small)),
        Forward("verify", length, causal, picks=range(length - small - 1, length)),
        Forward("commit", length, causal, picks=[length - 1]),
        Forward("draft with block cache", small, picks=range(small), offset=length - small, width=length),
    ]
