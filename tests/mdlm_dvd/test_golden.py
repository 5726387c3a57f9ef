"""Recorded behaviour (``tests/golden/MDLM-DVD``), one test a case. ``GOLDEN_DIR=folder`` reads ``folder/MDLM-DVD`` instead: other checkpoints and cases in the
same format must pass as well."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mdlm_dvd import decoding
from mdlm_dvd.adapters.llada_adapter import llada_generate
from mdlm_dvd.options import Unmask
from mdlm_dvd.src.llada import generate_per_step
from mdlm_dvd.src.model import ModelBroker
from mdlm_dvd.src.network import Network
from mdlm_dvd.src.token_utils import convert_tokens
from mdlm_dvd.src.utils import gumbel_scores, transfer_schedule
from mdlm_dvd.verification_algos import PUBLISHED_VERIFICATION
from tests.mdlm_dvd.models import golden, recorded

PUBLISHED = {
    "baseline_cascade": decoding.baseline_cascade_generate,
    "threshold_verifier": decoding.threshold_verifier_generate,
    "top_k_intersection": decoding.top_k_intersection_generate,
}


def cases(name: str, key: str = "cases", kind: str | None = None) -> list:
    found = json.loads((golden() / f"{name}.json").read_text())[key]
    found = [c for c in found if kind is None or c["kind"] == kind]
    return [pytest.param(c, id=f"{name}-{c.get('name', k)}") for k, c in enumerate(found)]


@pytest.mark.parametrize("case", cases("verification"))
def test_golden_verification(case):
    how = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in case["kwargs"].items()}
    drafted, verified = torch.tensor(case["drafter_output"]), torch.tensor(case["verifier_output"])
    masks = case["drafter_mask_id"], case["verifier_mask_id"]
    got, remask = PUBLISHED_VERIFICATION[case["algorithm"]](drafted, verified, *masks, **how)
    assert got.tolist() == case["verified"]
    assert sorted(remask) == sorted(case["remask_indices"])


@pytest.mark.parametrize("case", cases("schedule", "transfer_schedule"))
def test_golden_schedule(case):
    got = transfer_schedule(torch.tensor(case["mask_counts"]), case["steps"])
    assert got.tolist() == case["num_transfer_tokens"]


@pytest.mark.parametrize("case", cases("schedule", "gumbel"))
def test_golden_gumbel(case):
    uniform = torch.tensor(case["uniform"], dtype=torch.float64)
    got = gumbel_scores(torch.tensor(case["logits"]), uniform, case["temperature"])
    assert got.flatten().tolist() == pytest.approx(torch.tensor(case["result"]).flatten().tolist(), rel=1e-5)
    assert got.argmax(-1).tolist() == case["argmax"]


@pytest.mark.parametrize("case", cases("convert"))
def test_golden_conversion(case):
    source, target = (AutoTokenizer.from_pretrained(golden() / f"tokenizer_{case[k]}") for k in ("from", "to"))
    got = convert_tokens(source.mask_token_id, target.mask_token_id, case["input_ids"], source, target)
    assert got == case["output_ids"]


def test_golden_forward():
    want = load_file(golden() / "llada_forward.safetensors")
    ids = want["input_ids"]
    got = recorded("llada")(ids, torch.arange(ids.shape[1]).expand_as(ids))
    assert (got - want["logits"]).abs().max() <= 1e-4 * want["logits"].abs().max()
    out = llada_generate({"input_ids": ids}, {"model": recorded("llada")}, gen_length=5)
    assert torch.equal(out["logits"], got[:, -5:])
    assert out["tokens"] is None


@pytest.mark.parametrize("case", cases("llada_generate", kind="generate"))
def test_golden_generate(case):
    out = decoding.llada_generate(recorded("llada"), [case["prompt_ids"]], truncate_at_eos=False, **case["kwargs"])
    assert case["prompt_ids"] + out.tokens[0] == case["output_ids"]
    assert out.forwards["draft"] == case["kwargs"]["steps"] * (1 + (case["kwargs"]["cfg_scale"] > 0))


@pytest.mark.parametrize("case", cases("llada_generate", kind="per_step"))
def test_golden_per_step(case):
    how = dict(case["kwargs"])
    assert (how.pop("temperature"), how.pop("remasking")) == (0.0, "low_confidence")
    broker = ModelBroker.of(Network(recorded("llada")), None, "verifier")
    got, logits = generate_per_step(broker, case["prompt_ids"], unmask=Unmask(), **how)
    assert case["prompt_ids"] + got.tolist() == case["output_ids"]
    assert list(logits.shape) == case["logits_shape"]
    assert logits.argmax(-1).tolist() == case["step_argmax"]
    assert int((got == how["mask_id"]).sum()) == case["remaining_masks"]


@pytest.mark.parametrize("case", cases("llada_eos"))
def test_golden_eos(case):
    how = {**case["kwargs"], "truncate_at_eos": False}
    how |= {"eos_token_id": how.pop("eos_id"), "eot_token_id": how.pop("eot_id")}
    run = lambda **more: decoding.llada_generate(recorded("llada_eos"), [case["prompt_ids"]], **{**how, **more})  # noqa: E731
    assert case["prompt_ids"] + run().tokens[0] == case["output_ids"]
    without = run(logits_eos_inf=False, confidence_eos_eot_inf=False)
    assert case["prompt_ids"] + without.tokens[0] == case["output_without_flag"]


@pytest.mark.parametrize("case", cases("dvd_steps"))
def test_golden_dvd(case):
    how = {} if case["algorithm"] == "baseline_cascade" else {"drafter": recorded("llada_drafter")}
    decode, length = PUBLISHED[case["algorithm"]], case["kwargs"]["gen_length"]
    out = decode(
        recorded("llada_verifier"),
        case["prompt_ids"],
        truncate_at_eos=False,
        steps=case["steps"],
        **case["kwargs"],
        **how,
    )
    assert out.tokens == case["output_ids"]
    nfe = {lane: sum(s.forwards for s in kinds.values()) for lane, kinds in out.batch.items()}
    assert nfe.get("drafter", 0) == case["totals"]["drafter_nfe"]
    assert nfe["verifier"] == case["totals"]["verifier_nfe"]
    verifies = [v for c in out.completions for v in c.trace.verifies]
    assert sum(v.sent for v in verifies) == case["totals"]["drafted"]
    assert sum(v.accepted for v in verifies) == case["totals"]["accepted"]
    for row, completion in enumerate(out.completions):
        for step, recorded_step in enumerate(case["trace"]):
            region = [
                i if s <= step else None
                for i, s in zip(completion.tokens, completion.trace.step_of[-length:], strict=True)
            ]
            want = [None if i == case["kwargs"]["mask_id"] else i for i in recorded_step["gen_region"][row]]
            assert region == want, f"step {step}"
