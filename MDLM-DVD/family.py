"""MDLM-DVD as `shared.family` describes a family."""

from __future__ import annotations

from dataclasses import replace

from shared.family import Decoder, DecoderSetting, Family, Network, Training


def _size(hidden: int, feed_forward: int, layers: int, heads: int) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }


_VERIFIER = Training(
    "train.masked_diffusion:objective",
    "masked diffusion",
    config={"rope_theta": 1e4},
    sizes={"smoke": _size(64, 64, 2, 2), "tiny": _size(128, 336, 5, 4)},
    options="train.masked_diffusion:Options",
    from_prompt=True,
    more_padding=2,
)

FAMILY = Family(
    name="MDLM-DVD",
    package="mdlm_dvd",
    networks={
        "model": Network("shared.network.llada:LLaDAModelLM", "llada"),
        "drafter": Network("shared.network.llada:LLaDAModelLM", "llada"),
    },
    decoders={
        "cascade": Decoder("mdlm_dvd.decoding:cascade", "mdlm_dvd.options:Options", "mdlm_dvd.options:PRESETS"),
    },
    baseline=DecoderSetting("cascade"),
    exact=DecoderSetting("cascade"),
    trains={
        "model": _VERIFIER,
        "drafter": replace(_VERIFIER, sizes={"smoke": _size(32, 64, 1, 1), "tiny": _size(96, 256, 2, 3)}),
    },
    shipped={"tiny": {"model": "tiny/verifier", "drafter": "tiny/drafter"}},
)
