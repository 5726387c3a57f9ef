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

_DRAFTER = replace(
    _VERIFIER,
    config={"rope_theta": 1e4, "block_size": 32},
    sizes={"smoke": _size(32, 64, 1, 1), "tiny": _size(96, 256, 2, 3), "deep": _size(96, 256, 3, 3)},
)


def _decoder(function: str, options: str, presets: str, alone: bool = False) -> Decoder:
    roles = ("model",) if alone else None
    return Decoder(f"mdlm_dvd.decoding:{function}", f"mdlm_dvd.options:{options}", f"mdlm_dvd.options:{presets}", roles)


FAMILY = Family(
    name="MDLM-DVD",
    package="mdlm_dvd",
    networks={
        "model": Network("shared.network.llada:LLaDAModelLM", "llada", "shared.network.scoring:whole_prompt_scores"),
        "drafter": Network("shared.network.llada:LLaDAModelLM", "llada"),
    },
    decoders={
        "cascade": _decoder("cascade", "CascadeOptions", "CASCADE_PRESETS"),
        "topk_sets": _decoder("topk_sets_generate", "CascadeOptions", "CASCADE_PRESETS"),
        "verify_exact": _decoder("verify_exact_generate", "ExactOptions", "EXACT_PRESETS"),
        "threshold_verifier": _decoder("threshold_verifier_generate", "ThresholdOptions", "STEP_PRESETS"),
        "top_k_intersection": _decoder("top_k_intersection_generate", "StepOptions", "STEP_PRESETS"),
        "baseline_cascade": _decoder("baseline_cascade_generate", "StepOptions", "STEP_PRESETS", alone=True),
        "llada": _decoder("llada_generate", "VerifierOptions", "VERIFIER_PRESETS", alone=True),
    },
    # The verifier writes one token after the other: a round without drafts.
    baseline=DecoderSetting("cascade", {"draft_steps": 0}),
    plain=DecoderSetting("llada", {"confidence_threshold": 0.9}),
    exact=DecoderSetting("cascade"),
    method="cascade",
    trains={"model": _VERIFIER, "drafter": _DRAFTER},
    shipped={"tiny": {"model": "../D2F/tiny/llada", "drafter": "tiny/drafter"}},
)
