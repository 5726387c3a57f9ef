"""D2F as `shared.family` describes a family."""

from __future__ import annotations

from dataclasses import replace

from shared.family import Adapter, Decoder, DecoderSetting, Family, Network, Timed, Training


def _size(hidden: int, feed_forward: int, layers: int, heads: int, kv_heads: int) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


_BASE = Training(
    "train.masked_diffusion:objective",
    "masked diffusion",
    config={"rope_theta": 1e4},
    sizes={"smoke": _size(64, 64, 2, 2, 2), "tiny": _size(128, 336, 5, 4, 4)},
    options="train.masked_diffusion:Options",
    from_prompt=True,
)
_DREAM = replace(_BASE, sizes={"smoke": _size(64, 64, 2, 2, 1), "tiny": _size(128, 368, 5, 4, 2)})

FAMILY = Family(
    name="D2F",
    package="d2f",
    networks={
        "model": Network(
            "d2f.modeling_d2f:LLaDAForD2F",
            "llada",
            "shared.network.scoring:whole_prompt_scores",
            others=(Network("d2f.modeling_d2f:DreamForD2F", "Dream", "shared.network.scoring:whole_prompt_scores"),),
        ),
        "adapter": Adapter("model"),
    },
    decoders={
        "ssd": Decoder("d2f.generation_utils:generate_block_speculative", "d2f.options:Options", "d2f.options:PRESETS"),
        "d2f": Decoder(
            "d2f.generation_utils:generate_block_single", "d2f.options:StandardOptions", "d2f.options:PLAIN_PRESETS"
        ),
    },
    baseline=DecoderSetting("d2f", {"block_length": 1, "block_add_threshold": 1.0}),
    plain=DecoderSetting("d2f"),
    exact=DecoderSetting("ssd", {"do_verify_policy": "always", "acceptance": "exact", "cache_ver": True}),
    method="S2D2",
    trains={
        "model": replace(_BASE, others={"Dream": _DREAM}),
        "adapter": Training(
            "train.distillation:objective",
            "asymmetric distillation of it into an adapter",
            options="train.distillation:Options",
            from_prompt=True,
        ),
    },
    shapes={
        "llada-8b": {
            "model": {
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "mask_token_id": 126336,
            }
        },
        "dream-7b": {
            "model": {
                "model_type": "Dream",
                "vocab_size": 152064,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "mask_token_id": 151666,
            }
        },
    },
    timed={
        "model": Timed(
            "d2f.timed:two_copy_passes",
            "d2f.timed:two_copy_kinds",
            others={"Dream": Timed("d2f.timed:causal_passes", "d2f.timed:causal_kinds")},
        )
    },
    shipped={
        "llada": {"model": "tiny/llada", "adapter": "tiny/llada/adapter"},
        "dream": {"model": "tiny/dream", "adapter": "tiny/dream/adapter"},
    },
)
