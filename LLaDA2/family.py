"""LLaDA2 as `shared.family` describes a family."""

from __future__ import annotations

from shared.family import Decoder, DecoderSetting, Family, Network, Timed, Training


def _size(hidden: int, dense: int, layers: int, heads: int, kv_heads: int, experts: int, width: int) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": dense,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_experts": experts,
        "moe_intermediate_size": width,
    }


# The first layer is dense; two experts a token, half of four groups, one shared expert.
_TRAINED = {
    "use_bias": False,
    "rms_norm_eps": 1e-6,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.0,
    "block_size": 16,
}

FAMILY = Family(
    name="LLaDA2",
    package="llada2",
    networks={
        "model": Network(
            "llada2.modeling_llada2_moe:LLaDA2MoeModelLM",
            "llada2_moe",
            "shared.network.scoring:block_size_one_scores",
        )
    },
    decoders={
        "ssd_policy": Decoder(
            "llada2.generate_policy_utils:generate_ssd_policy", "llada2.options:Options", "llada2.options:PRESETS"
        ),
        "cached": Decoder(
            "llada2.generate_utils:generate_cached", "llada2.options:StandardOptions", "llada2.options:PLAIN_PRESETS"
        ),
        "nocache": Decoder(
            "llada2.generate_utils:generate_nocache", "llada2.options:NoCacheOptions", "llada2.options:NOCACHE_PRESETS"
        ),
    },
    baseline=DecoderSetting("cached", {"block_length": 1, "editing_threshold": 1.0, "max_post_steps": 0}),
    plain=DecoderSetting("cached"),
    exact=DecoderSetting(
        "ssd_policy",
        {
            "do_verify_policy": "always",
            "acceptance": "exact",
            "cache_ver": True,
            "draft_ver": True,
            "editing_threshold": 1.0,
        },
    ),
    method="S2D2",
    shapes={
        "llada2-mini": {
            "model": {
                "head_dim": 128,
                "use_bias": False,
                "rms_norm_eps": 1e-6,
                "rope_theta": 6e5,
                "num_experts_per_tok": 8,
                "num_shared_experts": 1,
                "first_k_dense_replace": 1,
            }
        }
    },
    timed={"model": Timed("shared.network.timed:two_copy_forwards", "shared.decode.spans:two_copy_kinds")},
    trains={
        "model": Training(
            "train.editing:objective",
            "block diffusion with token editing",
            config=_TRAINED,
            sizes={
                "smoke": _size(32, 64, 2, 2, 1, experts=8, width=16),
                "small": _size(96, 256, 4, 3, 1, experts=8, width=48),
                "tiny": _size(160, 400, 5, 6, 3, experts=8, width=80),
                "medium": _size(256, 704, 8, 8, 4, experts=16, width=96),
            },
        )
    },
    shipped={"tiny": {"model": "tiny"}},
)
