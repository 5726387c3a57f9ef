"""A drafter and a verifier as a model of lm-eval: `DVD_LM`. Texts are decoded by the algorithm, given answers are scored by the verifier alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from statistics import mean, median
from time import perf_counter
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from mdlm_dvd.src.evals.suite.decoders import Decoded, Pair
from mdlm_dvd.src.evals.suite.likelihood import is_greedy, masked_log_likelihood
from mdlm_dvd.src.model import ModelBroker
from shared.errors import UserError
from shared.options import Runtime

# What tasks may ask of a decoder beside its length, and the only value that changes nothing here.
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "top_p": 1.0, "top_k": 0}
DEFAULT_LENGTH = 256  # of answers, where neither the task nor the caller says: that of lm-eval
TIMED = 5  # forwards of each model, for the ratio of their costs


class DVD_LM(TemplateLM):
    """``algorithm`` is the name of one in the pair's registry, ``params`` are its keywords.

    ``gen_length``: masks behind a prompt; a task's ``max_gen_toks`` makes it shorter, never longer. ``steps`` above that length are one a token.
    Log-likelihoods are lower bounds estimated from ``mc_num`` maskings of the answer, seeded by ``seed`` and the number of the request; with
    ``check_greedy`` each answer is also decoded greedily, one forward a token. ``swap``: of the same pair, where one model at a time is on the device.
    """

    def __init__(
        self,
        pair: Pair,
        algorithm: str,
        *,
        gen_length: int | None = None,
        steps: int | None = None,
        batch_size: int = 1,
        seed: int = 0,
        mc_num: int = 128,
        mc_batch: int = 32,
        check_greedy: bool = True,
        swap: Swap | None = None,
        **params,
    ):
        super().__init__()
        for name, value in (
            ("mc_num", mc_num),
            ("mc_batch", mc_batch),
            ("batch_size", batch_size),
            ("gen_length", gen_length or 1),
        ):
            if value < 1:
                raise UserError(f"{name} is {value}. Allowed: at least 1")
        self.pair, self.method = pair, pair.method(algorithm)
        self.gen_length, self.steps, self.params = gen_length, steps, params
        self.batch_size, self.seed = batch_size, seed
        self.mc_num, self.mc_batch, self.check_greedy = mc_num, mc_batch, check_greedy
        self.scorer = pair.scorer("verifier")
        self.tokenizer = self.scorer.broker.tokenizer
        self.swap = swap
        self.decoded: list[Decoded] = []

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts, each before the first of its ``until`` strings, of at most ``max_gen_toks`` tokens."""
        found: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for k, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(k)
        with tqdm(total=len(requests), desc=self.method.name, disable=disable_tqdm or None) as bar:
            for members in groups.values():
                params, stop = self._asked(requests[members[0]].args[1])
                for at in range(0, len(members), self.batch_size):
                    part = members[at : at + self.batch_size]
                    prompts = [requests[k].args[0] for k in part]
                    if self.swap is not None:  # the verifier's device is where texts are
                        self.swap.bring(self.pair.verifier)
                    decoded = self.method.decode(
                        prompts, params, first=part[0], batch_size=len(part), seed=self.seed, stop=stop
                    )
                    self.decoded += decoded
                    found |= {k: d.text for k, d in zip(part, decoded, strict=True)}
                    bar.update(len(part))
        for k, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, found[k])
        return [found[k] for k in range(len(requests))]

    def _asked(self, task: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Keywords of the decode and stop strings, from a task's keywords under ours."""
        task = dict(task)
        until = task.pop("until", None) or []
        most, wanted = task.pop("max_gen_toks", None), self.gen_length
        length = min(n for n in (most, wanted, None if most or wanted else DEFAULT_LENGTH) if n)
        params = {"gen_length": length, **self.params}
        if self.steps is not None:
            params["steps"] = min(self.steps, length)
        sampled, temperature = task.pop("do_sample", None), task.pop("temperature", None)
        typed = {**self.params, **self.pair.verifier.pool.of("algorithm", {})}
        if "temperature" not in typed and sampled is not False and temperature:
            self._check_sampling(temperature)
            params["temperature"] = float(temperature)
        for key, value in task.items():
            if key not in NEUTRAL or (value is not None and float(value) != NEUTRAL[key]):
                raise UserError(
                    f"the task's {key} is {value!r}. Allowed: {NEUTRAL.get(key, 'max_gen_toks, until, temperature')}"
                )
        return params, [until] if isinstance(until, str) else [s for s in until if s]

    def _check_sampling(self, temperature: float) -> None:
        if not self.method.takes("temperature"):
            raise UserError(
                f"the task's temperature is {temperature}, and {self.method.name} is greedy. "
                "Allowed: an algorithm that samples (llada), --temperature 0"
            )

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        mask_id, found = self.scorer.mask_id, []
        for number, (texts, context, answer) in enumerate(tqdm(requests, desc="scores", disable=disable_tqdm or None)):
            if not answer:
                raise UserError(f"the answer of request {number} has no token. Allowed: a text of one at least")
            logits_of = self.scorer.logits_of(list(context), len(answer))
            how = {"draws": self.mc_num, "at_once": self.mc_batch, "seed": (self.seed, number)}
            score = masked_log_likelihood(logits_of, answer, mask_id, **how)
            found.append((score, self.check_greedy and is_greedy(logits_of, answer, mask_id)))
            self.cache_hook.add_partial("loglikelihood", texts, found[-1])
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise UserError(
            "masked diffusion gives whole texts no log-likelihood token by token. Allowed: tasks that generate, or that choose among answers"
        )

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return list(self.tokenizer(string, add_special_tokens=bool(add_special_tokens))["input_ids"])

    @property
    def tokenizer_name(self) -> str:
        return self.pair.verifier.name

    def averages(self) -> dict[str, float | int | None]:
        """What a text cost, over all that were decoded: ``drafter_cost`` is the time of a drafter's forward in forwards of the verifier, measured, and
        ``weighted_nfe`` counts in those. ``total_latency`` is of a text's whole batch. Empty where nothing was decoded."""
        if not self.decoded:
            return {}
        each = [asdict(d) for d in self.decoded]
        average = {
            name: mean(d[name] for d in each)
            for name in ("drafter_nfe", "verifier_nfe", "drafted", "accepted", "tokens")
        }
        drafted, seconds = sum(d["drafted"] for d in each), sum(d["seconds"] for d in each)
        cost = cost_ratio(self.pair, self.gen_length or DEFAULT_LENGTH)
        return {
            "drafter_nfe": average["drafter_nfe"],
            "verifier_nfe": average["verifier_nfe"],
            "drafter_cost": cost,
            "weighted_nfe": average["verifier_nfe"] + cost * average["drafter_nfe"],
            "drafted_count": average["drafted"],
            "accepted_count": average["accepted"],
            "acceptance_rate": sum(d["accepted"] for d in each) / drafted if drafted else None,
            "total_latency": mean(d["seconds"] * d["rows"] for d in each),
            "avg_step_latency": mean(d["step_seconds"] for d in each),
            "seconds_per_text": seconds / len(each),
            "tokens": average["tokens"],
            "tokens_per_second": sum(d["tokens"] for d in each) / seconds,
            "texts": len(each),
        }


def cost_ratio(pair: Pair, gen_length: int) -> float:
    """The time of a forward of the drafter over that of one of the verifier, on one prompt with ``gen_length`` masks and nothing cached."""
    times = {role: _forward_seconds(pair.scorer(role), gen_length) for role in ("drafter", "verifier")}
    return times["drafter"] / times["verifier"]


def _forward_seconds(scorer, gen_length: int) -> float:
    logits_of = scorer.logits_of("How many are left?", gen_length)
    states = torch.full((1, gen_length), scorer.mask_id)
    times: list[float] = []
    for _ in range(TIMED + 1):  # the first warms up
        began = perf_counter()
        float(logits_of(states)[0, 0, 0])  # waits for the device
        times.append(perf_counter() - began)
    return median(times[1:])


class Swap:
    """Keeps one model at a time on ``device``, that of the role whose turn it is; the other waits on the CPU. For two that do not fit together. Their
    forwards run as plain networks: what a GPU has captured or copied would stay behind."""

    def __init__(self, pair: Pair, device: torch.device):
        self.device, self.brokers = device, [pair.verifier, pair.drafter, *pair.alone.values()]
        for broker in self.brokers:
            stay(broker.model_state["model"], device)
            if broker.network is not None:
                broker.network.runtime = Runtime(fast=False, graphs=False)
            for name in ("logits", "logits_of_states", "generate"):
                setattr(broker, name, self._with(broker, getattr(broker, name)))
        pair.device = device

    def bring(self, broker: ModelBroker) -> None:
        """The others leave, then it comes."""
        model = broker.model_state["model"]
        for other in (b.model_state["model"] for b in self.brokers):
            if other is not model:
                other.to("cpu")
        model.to(self.device)

    def _with(self, broker: ModelBroker, call: Callable) -> Callable:
        def brought(*arguments, **keywords):
            self.bring(broker)
            return call(*arguments, **keywords)

        return brought


def stay(model: Any, device: torch.device) -> None:
    """``model`` says that it is on ``device`` while it waits elsewhere too: algorithms put texts where it is."""
    model.__class__ = type(type(model).__name__, (type(model),), {"device": property(lambda self: device)})
