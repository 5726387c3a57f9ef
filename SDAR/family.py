"""SDAR as `shared.family` describes a family."""

from __future__ import annotations

from shared.family import Decoder, DecoderSetting, Family, Network, Timed, Training

_QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "rope_theta": 1e6, "mask_token_id": 151669}

FAMILY = Family(
    name="SDAR",
    package="sdar",
    networks={
        "model": Network("sdar.modeling_sdar:SDARForCausalLM", "sdar", "shared.network.scoring:block_size_one_scores")
    },
    decoders={
        "ssd_policy": Decoder(
            "sdar.generate_ssd_policy:block_diffusion_generate", "sdar.options:Options", "sdar.options:PRESETS"
        ),
        "standard": Decoder(
            "sdar.generate:block_diffusion_generate", "sdar.options:StandardOptions", "sdar.options:PLAIN_PRESETS"
        ),
    },
    baseline=DecoderSetting("standard", {"block_length": 1}),
    plain=DecoderSetting("standard"),
    exact=DecoderSetting(
        "ssd_policy", {"do_verify_policy": "always", "acceptance": "exact", "cache_ver": True, "draft_ver": True}
    ),
    method="S2D2",
    shapes={
        "sdar-1.7b": {
            "model": {
                **_QWEN3,
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
            }
        },
        "sdar-4b": {
            "model": {
                **_QWEN3,
                "hidden_size": 2560,
                "intermediate_size": 9728,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
            }
        },
        "sdar-8b": {
            "model": {
                **_QWEN3,
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
            }
        },
    },
    timed={"model": Timed("shared.network.timed:two_copy_forwards", "shared.decode.spans:two_copy_kinds")},
    trains={
        "model": Training(
            "train.block_diffusion:objective", "block diffusion", config={"rope_theta": 1e4, "block_size": 16}
        )
    },
    shipped={"tiny": {"model": "tiny"}},
    block_length=16,
)
