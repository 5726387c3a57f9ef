"""Pairs across families, and DualDiffusion's pipeline."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from mdlm_dvd.dual_pipeline import dual_diffusion_generate, llada_generate_fn
from mdlm_dvd.src.model import Pool
from mdlm_dvd.src.registry import ModelRegistry
from mdlm_dvd.src.runtime import run
from mdlm_dvd.verification_algos import PUBLISHED_VERIFICATION
from shared.errors import UserError
from shared.family import FAMILIES
from shared.scripts.models import load_models
from tests.mdlm_dvd.models import golden

PROMPTS = [
    "Anna has 320 eggs. She loses 5 jars with 37 eggs in each. How many eggs does Anna have now?",
    "Repeat the word copper 4 times, separated by commas.",
]


@pytest.fixture(scope="module")
def registry():
    return ModelRegistry()


def pair(registry, drafter: str, verifier: str):
    pool = Pool({"device": "cpu", "dtype": "float32"})
    return [registry.load(name, role, pool) for name, role in ((drafter, "drafter"), (verifier, "verifier"))]


@pytest.mark.parametrize(
    ("drafter", "verifier"),
    [
        ("sdar_tiny", "tiny_verifier"),
        ("fast_dllm_v2_tiny", "sdar_tiny"),
        ("tiny_drafter", "fast_dllm_v2_tiny"),
        ("llada2_tiny", "d2f_tiny"),
    ],
)
def test_the_exact_cascade_of_any_pair_is_the_verifier_token_by_token(registry, drafter, verifier):
    """Whoever drafts: the verifier's own greedy text, in fewer of its forwards."""
    models, algorithm = pair(registry, drafter, verifier), registry.algorithm("cascade")
    how = {"gen_length": 64, "block_length": 16, "batch_size": 2}
    one = run(*models, algorithm, PROMPTS, draft_steps=0, **how)
    out = run(*models, algorithm, PROMPTS, **how)
    assert [r.token_ids for r in out] == [r.token_ids for r in one]
    assert "#### 135" in out[0].text
    for fast, slow in zip(out, one, strict=True):
        assert fast.stats()["verifier_nfe"] < slow.stats()["verifier_nfe"] / 2


@pytest.mark.parametrize("family", ["SDAR", "Fast-dLLM-v2"])
def test_a_verifier_of_another_family_writes_what_it_writes_there(registry, family):
    """At block size one, which its own family decodes too, on a token-causal cache."""
    found = FAMILIES[family]
    model = load_models(found, found.checkpoints("tiny"), dtype=torch.float32)[found.first]
    (broker, other) = pair(registry, "tiny_drafter", {"SDAR": "sdar_tiny"}.get(family, "fast_dllm_v2_tiny"))
    ids = [other.prompt_ids(p) for p in PROMPTS]
    decoder = found.decoders[found.baseline.decoder]
    options = decoder.options_class.from_flat({"max_new_tokens": 64, **found.baseline.options})
    own = decoder.generate(model, ids, options)
    out = run(broker, other, registry.algorithm("cascade"), PROMPTS, gen_length=64, batch_size=2)
    assert [r.token_ids for r in out] == own.tokens


@pytest.mark.parametrize("name", PUBLISHED_VERIFICATION)
def test_the_published_pipeline(registry, name):
    drafter, verifier = pair(registry, "tiny_drafter", "tiny_verifier")
    out = dual_diffusion_generate(
        drafter.model_state["model"], drafter.tokenizer, verifier.model_state["model"], verifier.tokenizer, PROMPTS[0],
        max_new_tokens=64, num_drafter_steps=8, num_verifier_steps=2, max_iterations=3, verification_fn=PUBLISHED_VERIFICATION[name],
    )  # fmt: skip
    stats = out["stats"]
    assert set(stats) == {"iterations", "total_drafter_steps", "total_verifier_steps", "tokens_remasked_per_iteration"}
    assert len(stats["tokens_remasked_per_iteration"]) == stats["iterations"] <= 3
    assert stats["total_drafter_steps"] <= 8 * stats["iterations"]
    assert out["output_ids"].shape[0] == 1
    assert drafter.tokenizer.decode(out["output_ids"][0], skip_special_tokens=True) == out["output_text"]
    if name in ("trust_verifier", "no_verification"):
        assert stats["iterations"] == 1, "nothing is masked again"


def test_functions_in_place_of_models_of_ours(registry):
    """``drafter_generate_fn`` and ``verifier_generate_fn`` are called for every forward."""
    drafter, verifier = pair(registry, "tiny_drafter", "tiny_verifier")
    calls = []

    def forward(model, tokenizer, input_ids, num_steps, **kwargs):
        calls.append(tuple(input_ids.shape))
        return llada_generate_fn(model, tokenizer, input_ids, num_steps)

    out = dual_diffusion_generate(
        drafter.model_state["model"], drafter.tokenizer, verifier.model_state["model"], verifier.tokenizer, PROMPTS[1],
        32, 4, drafter_generate_fn=forward, verifier_generate_fn=forward,
    )  # fmt: skip
    assert len(calls) == out["stats"]["total_drafter_steps"] + out["stats"]["total_verifier_steps"] == 5
    with pytest.raises(UserError, match="drafter_generate_fn is missing"):
        dual_diffusion_generate(
            object(), drafter.tokenizer, verifier.model_state["model"], verifier.tokenizer, "x", 8, 2
        )


def test_two_vocabularies_go_through_text(registry):
    """A drafter with another tokenizer: refused where ids are compared, and served by ``dual``."""
    drafter, verifier = pair(registry, "tiny_drafter", "tiny_verifier")
    other = AutoTokenizer.from_pretrained(golden() / "tokenizer_a")

    def write(model, tokenizer, input_ids, num_steps, **kwargs):
        logits = torch.zeros(1, input_ids.shape[1], len(tokenizer))
        logits[..., tokenizer("a", add_special_tokens=False).input_ids[0]] = 9.0
        return logits

    foreign = type("Foreign", (), {"config": type("C", (), {})(), "device": torch.device("cpu")})()
    out = dual_diffusion_generate(
        foreign,
        other,
        verifier.model_state["model"],
        verifier.tokenizer,
        PROMPTS[1],
        8,
        4,
        drafter_generate_fn=write,
        drafter_mask_id=1,
    )
    assert "a" in out["output_text"]
    drafter.model_state = {**drafter.model_state, "tokenizer": other}
    with pytest.raises(UserError, match="different vocabularies"):
        run(drafter, verifier, registry.algorithm("cascade"), PROMPTS[:1], gen_length=8)
