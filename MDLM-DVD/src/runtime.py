"""The loop: one algorithm's steps over a drafter and a verifier, for prompts in batches. There is no other.

An algorithm is a function in the published form, ``run_step(drafter, verifier, prompts, step_idx, total_steps, algo_state, **kwargs)``, which returns
``{"algo_state", "metrics", "results"?, "done"?}``, or in the older one, ``run_step(current_tokens, drafter, verifier, step_idx, total_steps, **kwargs)``, which
returns ``{"next_tokens", "metrics"}``. Steps end with ``done``, and at the last one unless that says ``done: False``. An algorithm that returns `Texts` under
``texts`` needs no results: they are read off it, with a trace. What a step returns under ``publish`` may be asked for by name in every later call for its batch.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mdlm_dvd.src.model import ModelBroker, Pool, call
from mdlm_dvd.src.registry import Algorithm
from mdlm_dvd.src.texts import Texts
from shared.errors import UserError
from shared.gpu.graphs import on_device
from shared.output import Completion

_STEP = ("drafter", "verifier", "prompts", "step_idx", "total_steps", "algo_state")
_OLDER = ("current_tokens", "mask_id", "prompt_len")
_RATES = {"acceptance_rate"}  # metrics that do not add up over steps
MOST_STEPS = 100_000


@dataclass
class Event:
    """What a listener hears of: a batch's step ``number`` is over; its ``metrics``, ``seconds``, and the texts where there are any."""

    batch: int
    number: int
    metrics: dict[str, Any]
    seconds: float
    texts: Texts | None = None
    rows: Sequence[int] = ()


@dataclass
class Result:
    """One prompt's result. ``completion``: of an algorithm that works on `Texts`, with its trace."""

    prompt: str | list[int]
    text: str
    token_ids: list[int]
    metrics: dict[str, float]
    seconds: float
    names: tuple[str, str, str] = ("", "", "")
    kwargs: dict[str, Any] = field(default_factory=dict)
    completion: Completion | None = None
    id: Any = None

    def record(self) -> dict[str, Any]:
        """As a line of output.jsonl: the published keys first."""
        drafter, verifier, algorithm = self.names
        return {
            "prompt": self.prompt,
            "output": self.text,
            "metrics": self.metrics,
            "id": self.id,
            "token_ids": self.token_ids,
            "drafter": drafter,
            "verifier": verifier,
            "algorithm": algorithm,
            "kwargs": self.kwargs,
            "stats": self.stats(),
            "timing": self.timing(),
        }

    def stats(self) -> dict[str, Any]:
        """Counts of this text alone, as if it had been decoded by itself; of other algorithms the metrics they reported."""
        if self.completion is None:
            return {k: v for k, v in self.metrics.items() if "latency" not in k}
        trace = self.completion.trace
        drafted, accepted = (sum(getattr(v, k) for v in trace.verifies) for k in ("sent", "accepted"))
        return {
            "iterations": trace.steps,
            **{f"{lane}_nfe": sum(s.forwards for s in kinds.values()) for lane, kinds in trace.lanes.items()},
            "drafted": drafted,
            "accepted": accepted,
            "rejected_per_iteration": [v.sent - v.accepted for v in trace.verifies],
            "acceptance_rate": accepted / drafted if drafted else None,
            "decided": trace.counts(),
        }

    def timing(self) -> dict[str, float]:
        return {"total_s": self.seconds, "tokens_per_s": len(self.token_ids) / max(self.seconds, 1e-9)}


def run(
    drafter: ModelBroker,
    verifier: ModelBroker,
    algorithm: Algorithm,
    prompts: Sequence[str | list[int]],
    *,
    steps: int | None = None,
    gen_length: int,
    batch_size: int = 1,
    seed: int = 0,
    listen: Callable[[Event], None] = lambda event: None,
    on_result: Callable[[Result], None] = lambda result: None,
    **kwargs,
) -> list[Result]:
    """Decode ``prompts`` (texts, or ids with their template already around them), ``batch_size`` at a time. ``kwargs`` go to the algorithm by name, beside
    what its registry entry gives; ``steps`` default to a token a step. Raises `UserError` for what no function can take."""
    for name, value in (
        ("gen_length", gen_length),
        ("steps", gen_length if steps is None else steps),
        ("batch_size", batch_size),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{name} is {value!r}. Allowed: a whole number, at least 1")
    pool, names = verifier.pool, (drafter.name, verifier.name, algorithm.name)
    values = {**algorithm.kwargs, **pool.of("algorithm", {}), **kwargs}
    values |= {"gen_length": gen_length, "batch_size": batch_size, "seed": seed}
    if steps is not None:
        values["steps"] = steps
    results: list[Result] = []
    with torch.inference_mode(), on_device(_device(verifier)):
        for first in range(0, len(prompts), batch_size):
            batch = list(prompts[first : first + batch_size])
            values["requests"] = range(first, first + len(batch))
            for result in _batch(
                drafter, verifier, algorithm, batch, steps or gen_length, values, first // batch_size, listen, pool
            ):
                result.names, result.id = names, len(results)
                result.kwargs = {k: v for k, v in values.items() if isinstance(v, (int, float, str, bool, type(None)))}
                results.append(result)
                on_result(result)
    return results


def _device(broker: ModelBroker) -> torch.device:
    return torch.device(getattr(broker.model_state["model"], "device", "cpu"))


def _batch(
    drafter: ModelBroker,
    verifier: ModelBroker,
    algorithm: Algorithm,
    prompts: list,
    steps: int,
    values: dict[str, Any],
    number: int,
    listen: Callable,
    pool: Pool,
) -> list[Result]:
    state: dict[str, Any] = {}
    totals: dict[str, float] = {"drafter_nfe": 0, "verifier_nfe": 0}
    step = _older(algorithm.step, drafter, verifier, prompts, values) if _is_older(algorithm.step) else algorithm.step
    pools = (drafter.pool, verifier.pool)
    for each in pools:
        each.published.clear()
    known = {} if "mask_id" in values else known_mask(verifier)
    began, latency, count, out = time.perf_counter(), 0.0, 0, {}
    while out.get("done") is False or (not out.get("done") and count < steps):
        if count == MOST_STEPS:
            raise UserError(f"algorithm {algorithm.name!r} is not done after {count} steps. Allowed: one that ends")
        start = time.perf_counter()
        given = {"drafter": drafter, "verifier": verifier, "prompts": prompts, "step_idx": count, "total_steps": steps}
        out = call(
            step,
            {},
            {**known, **values, **pool.published, **given, "algo_state": state},
            lambda n: pool.use("algorithm", n),
        )
        seconds = time.perf_counter() - start
        state, latency, count = out.get("algo_state", state), latency + seconds, count + 1
        metrics = out.get("metrics", {})
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and name not in _RATES:
                totals[name] = totals.get(name, 0) + value
        for each in pools:
            each.publish(out.get("publish") or {})
        listen(Event(number, count - 1, metrics, seconds, out.get("texts"), out.get("rows", ())))
    total = time.perf_counter() - began
    metrics = {
        **totals,
        "total_latency": total,
        "step_latency_sum": latency,
        "avg_step_latency": latency / max(count, 1),
    }
    if totals.get("drafted_count"):
        metrics["acceptance_rate"] = totals.get("accepted_count", 0) / totals["drafted_count"]
    return list(_results(algorithm, prompts, out, metrics, total))


def _results(algorithm: Algorithm, prompts: list, out: dict, metrics: dict, seconds: float) -> Iterator[Result]:
    if "texts" in out:
        for prompt, completion in zip(prompts, out["texts"].finish(), strict=True):
            yield Result(prompt, completion.text or "", completion.tokens, metrics, seconds, completion=completion)
        return
    found = out.get("results")
    if found is None or len(found) != len(prompts):
        raise UserError(
            f"algorithm {algorithm.name!r} returned {0 if found is None else len(found)} results for {len(prompts)} prompts. "
            'Allowed: "results", one a prompt, at its last step'
        )
    for prompt, result in zip(prompts, found, strict=True):
        result = result if isinstance(result, dict) else {"text": result}
        ids = result.get("tokens")
        ids = [] if ids is None else torch.as_tensor(ids).reshape(-1).tolist()
        yield Result(prompt, result.get("text", ""), ids, metrics, seconds)


def _is_older(step: Callable) -> bool:
    return "current_tokens" in inspect.signature(step).parameters


def _older(step: Callable, drafter: ModelBroker, verifier: ModelBroker, prompts: list, values: dict) -> Callable:
    """A step function of the older form as one of the newer: one text at a time, tokens ``[1, P + gen_length]`` in and out."""
    if len(prompts) > 1:
        raise UserError(
            f"batch_size is {len(prompts)}. Allowed with an algorithm of the older form (current_tokens): 1"
        )
    mask_id = mask_of(verifier, values.get("mask_id"))
    length = values["gen_length"]

    @functools.wraps(step)
    def newer(drafter, verifier, prompts, step_idx, total_steps, algo_state, **kwargs) -> dict:
        if step_idx == 0:
            prompt = prompts[0] if isinstance(prompts[0], list) else verifier.prompt_ids(prompts[0])
            algo_state = {
                "tokens": torch.tensor([prompt + [mask_id] * length], device=_device(verifier)),
                "prompt": len(prompt),
            }
        own = {"current_tokens": algo_state["tokens"], "drafter": drafter, "verifier": verifier, "step_idx": step_idx}
        given = {**kwargs, **own, "total_steps": total_steps, "mask_id": mask_id, "prompt_len": algo_state["prompt"]}
        out = call(step, {}, given)
        algo_state["tokens"] = out["next_tokens"]
        ids = out["next_tokens"][0, algo_state["prompt"] :].tolist()
        text = verifier.tokenizer.decode([i for i in ids if i != mask_id], skip_special_tokens=True)
        return {
            "algo_state": algo_state,
            "metrics": out.get("metrics", {}),
            "results": [{"text": text, "tokens": ids, "prompt": prompts[0]}],
            **{k: out[k] for k in ("done", "publish") if k in out},
        }

    # It asks for what the step asks for, beside what is made here.
    first = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in _STEP]
    others = [p for p in inspect.signature(step).parameters.values() if p.name not in (*_STEP, *_OLDER)]
    asks = [p if p.kind is p.VAR_KEYWORD else p.replace(kind=p.KEYWORD_ONLY) for p in others]
    newer.__signature__ = inspect.Signature([*first, *asks])
    return newer


def mask_of(broker: ModelBroker, given: int | None = None) -> int:
    """The mask token of a role's model: the flag's, else that of its network, its tokenizer, its configuration."""
    if given is not None:
        return given
    if found := known_mask(broker):
        return found["mask_id"]
    raise UserError(f"the mask token of {broker.name!r} is not known. Allowed: --mask_id ID")


def known_mask(broker: ModelBroker) -> dict[str, int]:
    """``{"mask_id": ...}`` of a role's model; nothing where it is not known."""
    model, tokenizer = broker.model_state["model"], broker.tokenizer
    if hasattr(model, "special_ids"):
        return {"mask_id": model.special_ids(tokenizer=tokenizer)[0]}
    found = getattr(tokenizer, "mask_token_id", None)
    found = getattr(getattr(model, "config", None), "mask_token_id", None) if found is None else found
    return {} if found is None else {"mask_id": found}
