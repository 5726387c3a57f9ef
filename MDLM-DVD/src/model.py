"""The broker: one role's model behind the three functions of its adapter, each given what it asks for by the names of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mdlm_dvd.src.network import Network
from mdlm_dvd.src.texts import Texts
from shared.errors import UserError
from shared.trace import Spent

# What the loop itself passes; no flag may set it.
RUNTIME_NAMES = frozenset(
    {"model", "model_state", "state", "tokenizer", "input_ids", "input_toks", "tensors", "drafter", "verifier", "prompts",
     "step_idx", "total_steps", "algo_state", "current_tokens", "logger", "rng"}
)  # fmt: skip


@dataclass
class Pool:
    """Values that functions may ask for: ``shared`` by all, then those of one ``role`` (``--drafter.steps``), then what functions ``published``.
    ``used``: the names some function took."""

    shared: dict[str, Any] = field(default_factory=dict)
    by_role: dict[str, dict[str, Any]] = field(default_factory=dict)
    published: dict[str, Any] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def of(self, role: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """All there is for ``role``; later ones win: ``defaults`` of its registry entry, flags, the role's flags, published values."""
        return {**defaults, **self.shared, **self.by_role.get(role, {}), **self.published}

    def publish(self, values: Mapping[str, Any]) -> None:
        """Give ``values`` to whatever is called from now on. Raises `UserError` for names that the loop itself passes."""
        for name in values:
            if name in RUNTIME_NAMES:
                raise UserError(f"{name!r} is published, which the loop itself passes. Allowed: any other name")
        self.published.update(values)

    def use(self, role: str, names: Sequence[str]) -> None:
        """Note that ``names`` were taken by ``role``."""
        self.used.update(n for n in names if n in self.shared)
        self.used.update(f"{role}.{n}" for n in names if n in self.by_role.get(role, {}))

    def unused(self) -> list[str]:
        """Flags that nobody took."""
        given = [*self.shared, *(f"{role}.{name}" for role, values in self.by_role.items() for name in values)]
        return [name for name in given if name not in self.used]


def call(function: Callable, first: Mapping[str, Any], values: Mapping[str, Any], noted: Callable = lambda names: None):
    """``function`` with ``first`` by position where it has names of its own for them, and with what its parameters name among ``values``; all of
    ``values`` where it takes ``**kwargs``. `UserError` for a parameter that nobody gives."""
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    own = {p.name for p in named[: len(first)]}
    rest = named[len(first) :]
    chosen = {k: v for k, v in values.items() if k not in own and (takes_all or any(p.name == k for p in rest))}
    noted(list(chosen))
    if missing := [p.name for p in rest if p.default is p.empty and p.name not in chosen]:
        source = inspect.unwrap(function)
        where = f"{inspect.getsourcefile(source)}:{source.__name__}"
        raise UserError(f"{where} asks for {', '.join(missing)}, which nobody gives. Allowed: --{missing[0]} VALUE")
    return function(*first.values(), **chosen)


@dataclass
class ModelBroker:
    """The model of one ``role``. ``module`` holds the functions that ``config``, its registry entry, names; ``model_state`` is what the first returned."""

    module: Any
    config: Mapping[str, Any]
    role: str = "verifier"
    pool: Pool = field(default_factory=Pool)
    model_state: dict[str, Any] | None = None
    forwards: int = 0

    def __post_init__(self):
        if self.model_state is None:
            values = {**self.config, **self.pool.of(self.role, self.config.get("kwargs") or {})}
            self.model_state = call(self._function("init_func"), {}, values, self._note)
        for needed in ("model", "tokenizer"):
            if needed not in self.model_state:
                raise UserError(
                    f"{self.config['init_func']} of {self.name!r} returns no {needed!r}. Allowed: a dict with model and tokenizer"
                )

    @classmethod
    def of(cls, network: Network, tokenizer: Any, role: str, name: str = "") -> ModelBroker:
        """A broker for a network that is loaded already."""
        state = {"model": network.model, "tokenizer": tokenizer, "network": network}
        return cls(SimpleNamespace(), {"name": name or role}, role, model_state=state)

    @property
    def name(self) -> str:
        return self.config["name"]

    @property
    def tokenizer(self) -> Any:
        return self.model_state["tokenizer"]

    @property
    def network(self) -> Network | None:
        """How the model is looked at where it is one of ours; None: by its adapter alone."""
        return self.model_state.get("network")

    def _function(self, key: str) -> Callable:
        return getattr(self.module, self.config[key])

    def _note(self, names: Sequence[str]) -> None:
        self.pool.use(self.role, names)

    def _values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.pool.of(self.role, self.config.get("kwargs") or {}), **given}

    def tokenize(self, prompt: str, **given) -> Any:
        """What the adapter's tokenizer function makes of ``prompt``, usually ``{"input_ids": [1, P]}``."""
        first = {"prompt": prompt, "state": self.model_state}
        return call(self._function("tokenizer_func"), first, self._values(given), self._note)

    def generate(self, input_toks: Any, **given) -> Any:
        """One call of the adapter's generate function: one forward."""
        self.forwards += 1
        first = {"input_toks": input_toks, "state": self.model_state}
        return call(self._function("gen_func"), first, self._values(given), self._note)

    def prompt_ids(self, prompt: str) -> list[int]:
        """The ids that stand before the region: with the adapter's template around them where its network is ours."""
        found = self.tokenize(prompt)
        ids = found["input_ids"] if hasattr(found, "keys") else found
        ids = torch.as_tensor(ids).reshape(-1).tolist()
        if self.network is None:
            return ids
        around = [self.model_state.get(k) for k in ("template_prefix_ids", "template_suffix_ids")]
        prefix, suffix = ([] if part is None else torch.as_tensor(part).tolist() for part in around)
        return [*prefix, *ids, *suffix]

    def logits(
        self,
        texts: Texts,
        rows: Sequence[int],
        region: Tensor,
        kind: str,
        *,
        cached: bool = False,
        beside: str | None = None,
        hide_prompt: bool = False,
    ) -> Tensor:
        """``[b, G, V]``: one pass over the texts of ``rows`` with ``region [b, G]``, counted as ``kind``; row ``j`` predicts region position ``j``. The mask
        token is never predicted. ``cached``, and ``beside`` (``queried``, ``ordered``): see `Network`."""
        if self.network is None:
            if beside is not None or hide_prompt:
                missing = (
                    "cfg_scale. Allowed: 0"
                    if beside is None
                    else f"verify_mode {beside}. Allowed: visible or leave_out"
                )
                raise UserError(f"{self.role} {self.name!r}, an adapter alone, has no {missing}")
            logits, spent = self._by_adapter(texts, rows, region)
        elif beside is not None:
            logits, spent = getattr(self.network, beside)(texts, rows, region)
        elif cached and self.network.can_cache:
            logits, spent = self.network.cached(texts, rows, region)
        else:
            logits, spent = self.network.whole(texts, rows, region, hide_prompt)
        if self.network is not None:
            self.forwards += 1
        texts.spend(self.role, kind, rows, spent)
        logits = logits.float()
        logits[..., texts.mask_id] = -torch.inf
        return logits

    def logits_of_states(self, texts: Texts, rows: Sequence[int], states: Tensor, kind: str) -> Tensor:
        """``[b, m, G, V]``: one pass over ``m`` states of each text's region, ``states [b, m, G]``."""
        count = states.shape[1]
        entries = [i for i in rows for _ in range(count)]
        if self.network is None:
            logits, spent = self._by_adapter(texts, entries, states.flatten(0, 1))
        else:
            logits, spent = self.network.whole(texts, entries, states.flatten(0, 1))
            self.forwards += 1
        each = [Spent(1, *(count * n for n in spent[k * count][1:])) for k in range(len(rows))]
        texts.spend(self.role, kind, rows, each)
        logits = logits.float()
        logits[..., texts.mask_id] = -torch.inf
        return logits.unflatten(0, (len(rows), count))

    def _by_adapter(self, texts: Texts, rows: Sequence[int], region: Tensor):
        """The same through the adapter, for texts of one length at a time: nothing is padded, so that a row gets what it would get alone."""
        ids, length = texts.with_region(rows, region), texts.gen_length
        order = sorted(range(len(rows)), key=lambda k: texts.lengths[rows[k]])
        parts: list[Tensor | None] = [None] * len(rows)
        for prompt, some in groupby(order, key=lambda k: texts.lengths[rows[k]]):
            some = list(some)
            block = ids[some, : prompt + length]
            given = {"initialize": False, "gen_length": length, "mask_id": texts.mask_id, "prompt_len": prompt}
            out = self.generate({"input_ids": block, "attention_mask": torch.ones_like(block)}, **given)
            logits = out["logits"] if isinstance(out, Mapping) else getattr(out, "logits", out)
            for k, row in zip(some, logits[:, -length:], strict=True):
                parts[k] = row
        counts = [texts.lengths[i] + length for i in rows]
        return torch.stack(parts).to(region.device), [Spent(1, n, length, 0, n * n) for n in counts]
