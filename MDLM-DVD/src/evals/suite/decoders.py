"""The decoders that the suite compares: an algorithm over a drafter and a verifier, and each of the two alone."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from mdlm_dvd.src.evals.suite.likelihood import LogitsOf
from mdlm_dvd.src.model import ModelBroker, Pool
from mdlm_dvd.src.registry import Algorithm, ModelRegistry
from mdlm_dvd.src.runtime import Result, mask_of, run
from mdlm_dvd.src.texts import Ask, Texts
from shared.decode.calls import Call
from shared.errors import UserError

ALONE = "llada"  # the algorithm of a model alone
LOOP = ("gen_length", "steps")  # keywords of the loop, whatever the algorithm is


@dataclass(frozen=True)
class Decoded:
    """A text and what it cost. ``seconds``: its share of those of its batch, in which ``rows`` texts were decoded at a time; ``step_seconds``: those of a
    step of the batch, on average."""

    text: str
    tokens: int
    seconds: float
    step_seconds: float
    rows: int
    drafter_nfe: int
    verifier_nfe: int
    drafted: int
    accepted: int


@dataclass(frozen=True)
class Method:
    """``name`` as reports call it. ``drafter`` and ``verifier``: the brokers that its ``algorithm`` is given. ``swapped``: the drafter is alone, so that
    what counts as the verifier's is its own."""

    name: str
    drafter: ModelBroker
    verifier: ModelBroker
    algorithm: Algorithm
    swapped: bool = False

    def takes(self, name: str) -> bool:
        """Does the algorithm, or the loop around it, ask for a keyword of this name?"""
        parameters = inspect.signature(self.algorithm.step).parameters
        return name in (*LOOP, *parameters) or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def decode(
        self,
        prompts: Sequence[str],
        params: Mapping[str, Any],
        *,
        first: int = 0,
        batch_size: int = 1,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[Decoded]:
        """``batch_size`` prompts at a time. They have the numbers ``first``, ``first + 1``, ...; random draws depend on that and on ``seed`` alone. A text
        ends before one of the strings ``stop``."""
        found = []
        for at in range(0, len(prompts), batch_size):
            part = list(prompts[at : at + batch_size])
            for broker in (self.drafter, self.verifier):
                for prompt in part:
                    check_room(broker, broker.prompt_ids(prompt), params.get("gen_length", 0))
            numbers = range(first + at, first + at + len(part))
            seed_everything(seed, numbers[0])
            call = Call(requests=numbers, seed=seed, stop=stop, tokenizer=self.verifier.tokenizer)
            results = run(
                self.drafter,
                self.verifier,
                self.algorithm,
                part,
                batch_size=len(part),
                seed=seed,
                **{"call": call, **params},
            )
            found += [self._decoded(result, len(part), stop) for result in results]
        return found

    def _decoded(self, result: Result, rows: int, stop: Sequence[str]) -> Decoded:
        counts = {**result.metrics, **result.stats()}
        nfe = [int(counts.get(f"{role}_nfe", 0)) for role in ("drafter", "verifier")]
        drafted, accepted = (int(counts.get(k, counts.get(f"{k}_count", 0))) for k in ("drafted", "accepted"))
        drafter_nfe, verifier_nfe = reversed(nfe) if self.swapped else nfe
        # An algorithm of a user's may know nothing of stop strings.
        text = result.text[: min((at for s in stop if (at := result.text.find(s)) >= 0), default=None)]
        return Decoded(
            text=text,
            tokens=len(result.token_ids),
            seconds=result.seconds / rows,
            step_seconds=result.metrics["avg_step_latency"],
            rows=rows,
            drafter_nfe=drafter_nfe,
            verifier_nfe=verifier_nfe,
            drafted=drafted,
            accepted=accepted,
        )


def seed_everything(seed: int, number: int) -> None:
    """Seed what a user's own script may draw from; decoders of this repository draw from numbers of their own."""
    random.seed(f"{seed} {number}")
    numpy.random.seed((seed + number) % (1 << 32))
    torch.manual_seed((seed + number) % (1 << 63))


class Pair:
    """A drafter and a verifier of a registry, loaded once each, and the methods that they make."""

    def __init__(self, registry: ModelRegistry, drafter: str, verifier: str, pool: Pool | None = None, **how):
        self.registry = registry
        self.verifier = registry.load(verifier, "verifier", pool, **how)
        self.drafter = registry.load(drafter, "drafter", pool, **how)
        # The same networks, in the role that the decode of a model alone gives it.
        self.alone = {"verifier": self.verifier, "drafter": registry.load(drafter, "verifier", pool, **how)}
        self.device = torch.device(getattr(self.verifier.model_state["model"], "device", "cpu"))

    def method(self, algorithm: str) -> Method:
        """The algorithm of that name over both."""
        return Method(algorithm, self.drafter, self.verifier, self.registry.algorithm(algorithm))

    def baseline(self, role: str) -> Method:
        """The model of ``role`` alone."""
        broker = self.alone[role]
        return Method(f"{role} alone", broker, broker, self.registry.algorithm(ALONE), swapped=role == "drafter")

    def parameters(self) -> dict[str, int]:
        """How many each model has; 0 where that is not known."""
        return {
            role: parameters_of(broker) for role, broker in (("drafter", self.drafter), ("verifier", self.verifier))
        }

    def scorer(self, role: str) -> Scorer:
        """What the model of ``role`` says of given text."""
        return Scorer(self.alone[role], self.device)


def check_room(broker: ModelBroker, prompt: Sequence[int], length: int) -> None:
    """Raise `UserError` where a prompt and an answer of ``length`` tokens have more than the model's positions."""
    limit = getattr(getattr(broker.model_state["model"], "config", None), "max_position_embeddings", None)
    if limit is not None and len(prompt) + length > limit:
        raise UserError(
            f"a prompt has {len(prompt)} tokens and its answer {length}. Allowed with {broker.name!r}: {limit} in all"
        )


def parameters_of(broker: ModelBroker) -> int:
    """The parameters of a broker's model."""
    of: Callable = getattr(broker.model_state["model"], "parameters", tuple)
    return sum(p.numel() for p in of())


@dataclass(frozen=True)
class Scorer:
    """Logits of states of a given text, for `likelihood`."""

    broker: ModelBroker
    device: torch.device

    @property
    def mask_id(self) -> int:
        return mask_of(self.broker)

    def ids(self, text: str) -> list[int]:
        """The tokens of an answer."""
        return list(self.broker.tokenizer(text, add_special_tokens=False)["input_ids"])

    def logits_of(self, prompt: str | list[int], length: int) -> LogitsOf:
        """Logits of states ``[m, length]`` of the answer behind ``prompt``: a text, which gets its template, or ids."""
        ids = self.broker.prompt_ids(prompt) if isinstance(prompt, str) else prompt
        check_room(self.broker, ids, length)
        texts = Texts([ids], Ask(gen_length=length, mask_id=self.mask_id, device=self.device))

        def logits_of(states: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                return self.broker.logits_of_states(texts, [0], states[None].to(self.device), "verify")[0]

        return logits_of
