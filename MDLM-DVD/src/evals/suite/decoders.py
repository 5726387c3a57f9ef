"""The decoders that the suite compares: an algorithm over a drafter and a verifier, and each of the two alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from mdlm_dvd.src.evals.suite.likelihood import LogitsOf
from mdlm_dvd.src.model import ModelBroker
from mdlm_dvd.src.registry import Algorithm, ModelRegistry
from mdlm_dvd.src.runtime import Result, mask_of, run
from mdlm_dvd.src.texts import Ask, Texts
from shared.decode.calls import Call
from shared.errors import UserError

ALONE = "llada"  # the algorithm of a model alone


@dataclass(frozen=True)
class Decoded:
    """A text and what it cost. ``seconds``: its share of those of its batch, in which ``rows`` texts were decoded at a time."""

    text: str
    tokens: int
    seconds: float
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

    def decode(
        self, prompts: Sequence[str], params: Mapping[str, Any], *, first: int = 0, batch_size: int = 1, seed: int = 0
    ) -> list[Decoded]:
        """``batch_size`` prompts at a time. They have the numbers ``first``, ``first + 1``, ...; random draws depend on that and on ``seed`` alone."""
        found = []
        for at in range(0, len(prompts), batch_size):
            part = list(prompts[at : at + batch_size])
            numbers = range(first + at, first + at + len(part))
            seed_everything(seed, numbers[0])
            results = run(
                self.drafter, self.verifier, self.algorithm, part, batch_size=len(part), seed=seed,
                **{"call": Call(requests=numbers, seed=seed), **params},
            )  # fmt: skip
            found += [self._decoded(result, len(part)) for result in results]
        return found

    def _decoded(self, result: Result, rows: int) -> Decoded:
        counts = {**result.metrics, **result.stats()}
        nfe = [int(counts.get(f"{role}_nfe", 0)) for role in ("drafter", "verifier")]
        drafted, accepted = (int(counts.get(k, counts.get(f"{k}_count", 0))) for k in ("drafted", "accepted"))
        return Decoded(
            result.text, len(result.token_ids), result.seconds / rows, rows, *(reversed(nfe) if self.swapped else nfe), drafted, accepted
        )  # fmt: skip


def seed_everything(seed: int, number: int) -> None:
    """Seed what a user's own script may draw from; decoders of this repository draw from numbers of their own."""
    random.seed(f"{seed} {number}")
    numpy.random.seed((seed + number) % (1 << 32))
    torch.manual_seed((seed + number) % (1 << 63))


class Pair:
    """A drafter and a verifier of a registry, loaded once each, and the methods that they make."""

    def __init__(self, registry: ModelRegistry, drafter: str, verifier: str, **how):
        self.registry = registry
        self.verifier = registry.load(verifier, "verifier", **how)
        self.drafter = registry.load(drafter, "drafter", **how)
        # The same networks, in the role that the decode of a model alone gives it.
        self.alone = {"verifier": self.verifier, "drafter": registry.load(drafter, "verifier", **how)}

    @property
    def device(self) -> torch.device:
        return torch.device(getattr(self.verifier.model_state["model"], "device", "cpu"))

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
        return Scorer(self.alone[role])


def parameters_of(broker: ModelBroker) -> int:
    """The parameters of a broker's model."""
    of: Callable = getattr(broker.model_state["model"], "parameters", tuple)
    return sum(p.numel() for p in of())


@dataclass(frozen=True)
class Scorer:
    """Logits of states of a given text, for `likelihood`."""

    broker: ModelBroker

    @property
    def mask_id(self) -> int:
        return mask_of(self.broker)

    def ids(self, text: str) -> list[int]:
        """The tokens of an answer."""
        return list(self.broker.tokenizer(text, add_special_tokens=False)["input_ids"])

    def logits_of(self, prompt: str | list[int], length: int) -> LogitsOf:
        """Logits of states ``[m, length]`` of the answer behind ``prompt``: a text, which gets its template, or ids."""
        ids = self.broker.prompt_ids(prompt) if isinstance(prompt, str) else prompt
        limit = getattr(getattr(self.broker.model_state["model"], "config", None), "max_position_embeddings", None)
        if limit is not None and len(ids) + length > limit:
            raise UserError(f"a prompt and its answer have {len(ids)} and {length} tokens. Allowed: {limit} in all")
        device = torch.device(getattr(self.broker.model_state["model"], "device", "cpu"))
        texts = Texts([ids], Ask(gen_length=length, mask_id=self.mask_id, device=device))

        def logits_of(states: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                return self.broker.logits_of_states(texts, [0], states[None].to(device), "verify")[0]

        return logits_of
