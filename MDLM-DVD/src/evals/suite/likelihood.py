"""What models say of given text: a Monte-Carlo bound under masked diffusion (Nie et al. 2025, equation 6), perplexity under a causal network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

import torch
from torch import Tensor

from shared.errors import UserError

# ``logits_of(states [m, L])``: logits ``[m, L, V]`` of the answer's ``m`` states behind the prompt, one forward.
LogitsOf = Callable[[Tensor], Tensor]


def masked_log_likelihood(
    logits_of: LogitsOf,
    target: Sequence[int],
    mask_id: int,
    *,
    draws: int = 128,
    at_once: int = 32,
    seed: Sequence[int] = (0,),
) -> float:
    """A lower bound of the log-likelihood of ``target``, estimated: ``E_n[L / n * sum of log p over n masked tokens]``, ``n`` uniform from 1 to ``L``.

    The counts ``n`` of one forward's ``at_once`` draws are spread evenly, which leaves the expectation and takes away variance. ``seed``: numbers that
    the draws depend on, and on nothing else.
    """
    ids = torch.tensor(list(target))
    length, total, done = len(ids), 0.0, 0
    if not length:
        return 0.0
    source = torch.Generator().manual_seed(_mixed(seed))
    while done < draws:
        rows = min(at_once, draws - done)
        first = int(torch.randint(length, (1,), generator=source))
        counts = (first + torch.arange(rows) * length // rows) % length + 1
        order = torch.rand(rows, length, generator=source).argsort(-1).argsort(-1)
        hidden = order < counts[:, None]
        states = torch.where(hidden, mask_id, ids)
        scores = logits_of(states).double().log_softmax(-1).cpu()
        scores = scores.gather(-1, ids.expand(rows, -1)[..., None])[..., 0]
        total += float((scores.where(hidden, 0.0).sum(-1) * length / counts).sum())
        done += rows
    return total / draws


def _mixed(seed: Sequence[int]) -> int:
    """One seed from several numbers."""
    found = 0
    for number in seed:
        found = (found * 1_000_003 + number + 1) % (1 << 63)
    return found


def is_greedy(logits_of: LogitsOf, target: Sequence[int], mask_id: int) -> bool:
    """Would greedy decoding, the likeliest token first, one a step, write ``target``?"""
    ids = torch.tensor(list(target))
    state = torch.full_like(ids, mask_id)
    for _ in range(len(ids)):
        best, tokens = logits_of(state[None])[0].double().softmax(-1).max(-1)
        place = int(best.cpu().masked_fill(state != mask_id, -1).argmax())
        if int(tokens[place]) != int(ids[place]):
            return False
        state[place] = ids[place]
    return True


@dataclass(frozen=True)
class Perplexity:
    """``exp(nats / tokens)`` over all texts together."""

    nats: float
    tokens: int
    texts: int

    @property
    def value(self) -> float | None:
        return exp(self.nats / self.tokens) if self.tokens else None

    @property
    def mean_tokens(self) -> float | None:
        """Tokens a text: a short text is likelier than a long one, so that no perplexity means anything without."""
        return self.tokens / self.texts if self.texts else None

    def record(self) -> dict[str, Any]:
        return {"perplexity": self.value, "tokens": self.tokens, "texts": self.texts, "mean_tokens": self.mean_tokens}


def load_causal(path: str, device: torch.device):
    """``(model, tokenizer)`` of a causal network, in transformers' own classes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True)
        return model.to(device).eval(), AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"generative_perplexity.model {path!r} cannot be loaded ({reason}). Allowed: a causal LM's folder or hub id"
        ) from error


@torch.inference_mode()
def generative_perplexity(model, tokenizer, texts: Sequence[str]) -> Perplexity:
    """The perplexity of ``texts`` under a causal network, each behind its first token (BOS where the tokenizer has one); later tokens of a text that is
    longer than the network's positions are left out. Texts of no token count for nothing."""
    limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    nats, count, used = 0.0, 0, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id, *ids]
        ids = torch.tensor([ids[:limit]], device=model.device)
        if ids.shape[1] < 2:
            continue
        scores = model(ids).logits[0, :-1].double().log_softmax(-1)
        nats -= float(scores.gather(-1, ids[0, 1:, None]).sum())
        count, used = count + ids.shape[1] - 1, used + 1
    return Perplexity(nats, count, used)
