"""The decoders as functions over networks, with the `Output` of every family: ``cascade(model, prompts, options, drafter=...)`` and the others.

Behind each is one algorithm and the loop of `mdlm_dvd.src.runtime`, as behind main.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mdlm_dvd import options as kinds
from mdlm_dvd.algorithms import baseline, llada, threshold_verifier, top_k_intersection, topk_sets, verify_exact
from mdlm_dvd.algorithms import cascade as cascade_algorithm
from mdlm_dvd.src.model import ModelBroker
from mdlm_dvd.src.network import Network
from mdlm_dvd.src.registry import Algorithm
from mdlm_dvd.src.runtime import Event, run
from shared.decode.calls import Call, checked, split_call
from shared.network.sizes import sizes_of
from shared.options import FlatOptions
from shared.output import Lossless, Output, losslessness
from shared.trace import add_lanes

ALONE = "the verifier's own decode"


def llada_generate(model, input_ids, options: kinds.VerifierOptions | None = None, **flat) -> Output:
    """The verifier alone (Nie et al. 2025, algorithms 4 and 5). ``options``: a `VerifierOptions`; flat keywords change single fields, fields of
    `shared.decode.calls.Call` are keywords too."""
    return _decode(kinds.VerifierOptions, Algorithm("llada", llada.run_step), model, None, input_ids, options, flat)


def cascade(model, input_ids, options: kinds.CascadeOptions | None = None, *, drafter, **flat) -> Output:
    """``model`` verifies what ``drafter`` wrote in several steps: see `mdlm_dvd.algorithms.cascade`."""
    algorithm = Algorithm("cascade", cascade_algorithm.run_step)
    return _decode(kinds.CascadeOptions, algorithm, model, drafter, input_ids, options, flat)


def topk_sets_generate(model, input_ids, options: kinds.CascadeOptions | None = None, *, drafter, **flat) -> Output:
    """The cascade with the rule ``topk_sets``."""
    algorithm = Algorithm("topk_sets", topk_sets.run_step)
    return _decode(kinds.CascadeOptions, algorithm, model, drafter, input_ids, options, flat)


def verify_exact_generate(model, input_ids, options: kinds.ExactOptions | None = None, *, drafter, **flat) -> Output:
    """``model``'s own greedy decode, of which ``drafter`` proposes steps: see `mdlm_dvd.algorithms.verify_exact`."""
    algorithm = Algorithm("verify_exact", verify_exact.run_step)
    return _decode(kinds.ExactOptions, algorithm, model, drafter, input_ids, options, flat)


def threshold_verifier_generate(
    model, input_ids, options: kinds.ThresholdOptions | None = None, *, drafter, **flat
) -> Output:
    """DVD's ``threshold_verifier``."""
    algorithm = Algorithm("threshold_verifier", threshold_verifier.run_step)
    return _decode(kinds.ThresholdOptions, algorithm, model, drafter, input_ids, options, flat)


def top_k_intersection_generate(
    model, input_ids, options: kinds.StepOptions | None = None, *, drafter, **flat
) -> Output:
    """DVD's ``top_k_intersection``."""
    algorithm = Algorithm("top_k_intersection", top_k_intersection.run_step)
    return _decode(kinds.StepOptions, algorithm, model, drafter, input_ids, options, flat)


def baseline_cascade_generate(model, input_ids, options: kinds.StepOptions | None = None, **flat) -> Output:
    """DVD's ``baseline_cascade``: the verifier alone, places by the largest logit."""
    algorithm = Algorithm("baseline_cascade", baseline.run_step)
    return _decode(kinds.StepOptions, algorithm, model, None, input_ids, options, flat)


def _resolve(model, options: Any, tokenizer) -> Any:
    """Options with the checkpoint's ids filled in."""
    region = options.region
    mask_id, stops = model.special_ids(region.mask_id, region.stopping_criteria_idx, tokenizer)
    return options.replace(mask_id=mask_id, stopping_criteria_idx=list(stops))


def as_network(model, runtime: Any) -> Network:
    """How a decoder looks at a network: a `Network` as it is, a model block by block where its config names a ``block_size``, else whole."""
    if isinstance(model, Network):
        return model
    return Network(model, getattr(model.config, "block_size", None), runtime=runtime)


def _decode(kind: type[FlatOptions], algorithm: Algorithm, model, drafter, input_ids, options, flat: dict) -> Output:
    """Check, decode, and shape the result. Raises `UserError` before any forward when a prompt, an option or the call does not fit."""
    options, call = split_call(kind, options, flat)
    network = as_network(model, options.runtime)
    job = checked(network.model, input_ids, options, call, _resolve)
    verifier = ModelBroker.of(network, call.tokenizer, "verifier")
    if drafter is None or drafter is model:
        second = replace(network) if drafter is not None else network
    else:
        second = as_network(drafter, options.runtime)
    other = ModelBroker.of(second, call.tokenizer, "drafter")
    done, counted = [], []
    requests = range(len(job.prompts)) if call.requests is None else list(call.requests)
    rows, values = job.rows, job.options.to_flat()
    length = values.pop("max_new_tokens")
    steps = values.pop("steps", None)
    for first in range(0, len(job.prompts), rows):
        part = slice(first, first + rows)
        here = replace(
            call,
            requests=requests[part],
            uniforms=None if call.uniforms is None else call.uniforms[part],
            attention_mask=None,
        )
        prompts, found = job.prompts[part], []
        finished = _finisher(call, found)
        results = run(
            other, verifier, algorithm, prompts, gen_length=length, batch_size=len(prompts), seed=call.seed,
            steps=steps, listen=finished, **values, call=here,
        )  # fmt: skip
        counted.append(found[-1].texts.batch)
        for result in results:
            done.append(result.completion)
            if call.on_finish:
                call.on_finish(result.completion)
    lanes = {"verifier": network.model, "drafter": second.model}
    batch = add_lanes(counted)
    return Output(
        done,
        time.perf_counter() - job.began,
        lossless_of(algorithm.name, job.options),
        batch=batch,
        sizes={name: sizes_of(lanes[name]) for name in batch},
    )


def _finisher(call: Call, events: list[Event]) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        events[:] = [event]

    return listen


def lossless_of(algorithm: str, options: Any) -> Lossless:
    """Does the text equal what the verifier writes alone, and in which way?"""
    if algorithm in ("llada", "baseline_cascade"):
        return Lossless(True, "the verifier decodes alone, which is the reference", ALONE)
    if algorithm == "verify_exact":
        return Lossless(True, "every step is the verifier's own: same greedy text", ALONE)
    if algorithm != "cascade":
        return Lossless(False, "drafts are kept by a rule, not because the verifier would have written them", ALONE)
    acceptance = options.acceptance
    broken = {
        f"accept {acceptance.accept} keeps what the verifier would not have written": acceptance.accept != "exact",
        f"verify_mode {acceptance.verify_mode} shows the verifier what it judges": acceptance.verify_mode != "ordered",
        "max_iterations ends verifying": acceptance.max_iterations is not None,
    }
    return losslessness(broken, "greedy text", "the verifier's own block size one")


def lossless_named(algorithm: Algorithm, kwargs: dict[str, Any]) -> Lossless | None:
    """The same for an algorithm of the registry and the values its options were made of; None where it is a user's own."""
    own = {
        "cascade": (cascade_algorithm, kinds.CascadeOptions),
        "topk_sets": (topk_sets, kinds.CascadeOptions),
        "verify_exact": (verify_exact, kinds.ExactOptions),
        "llada": (llada, kinds.VerifierOptions),
        "baseline_cascade": (baseline, kinds.StepOptions),
        "threshold_verifier": (threshold_verifier, kinds.ThresholdOptions),
        "top_k_intersection": (top_k_intersection, kinds.StepOptions),
    }
    if algorithm.name not in own or own[algorithm.name][0].run_step is not algorithm.step:
        return None
    kind = own[algorithm.name][1]
    return lossless_of(algorithm.name, kind.from_flat({k: v for k, v in kwargs.items() if k in kind.names()}))
