"""The suite's configuration: a JSON file, with what it inherits, checked to the last key before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from mdlm_dvd.src.evals.suite.problems import NAMES
from shared.errors import UserError, unknown_name

SHIPPED = Path(__file__).parent / "configs"
ROLES = ("verifier", "drafter")


@dataclass(frozen=True)
class DataSet:
    """``limit``: the first problems only; null: all."""

    limit: int | None = None


@dataclass(frozen=True)
class Accuracy:
    """``confidence`` of the interval around it."""

    confidence: float = 0.95


@dataclass(frozen=True)
class Diversity:
    """Over the outputs of a run. ``self_bleu``: of this many of them, since each is compared with all others; 0: not at all."""

    distinct_n: list[int] = field(default_factory=lambda: [2, 3])
    self_bleu: int = 100


@dataclass(frozen=True)
class Speed:
    """The first ``problems`` of each data set once more with each of ``batch_sizes``, by the method under test and the first setting of each baseline."""

    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32])
    problems: int = 32


@dataclass(frozen=True)
class Robustness:
    """``prompts``: groups of prompts that mean the same; ``adversarial``: prompts whose outputs are kept for reading."""

    prompts: list[list[str]] = field(default_factory=list)
    adversarial: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class GenerativePerplexity:
    """Of outputs under the causal language model ``model``, a folder or a hub id."""

    model: str


@dataclass(frozen=True)
class HeldOutBound:
    """Of the first ``problems``' solutions under the verifier and under the drafter, from ``draws`` maskings each."""

    draws: int = 128
    problems: int = 32


@dataclass(frozen=True)
class Metrics:
    """What is measured; null: not."""

    accuracy: Accuracy = field(default_factory=Accuracy)
    diversity: Diversity | None = None
    speed: Speed | None = None
    robustness: Robustness | None = None
    generative_perplexity: GenerativePerplexity | None = None
    held_out_bound: HeldOutBound | None = None


@dataclass(frozen=True)
class Config:
    """``model_params``, of the ``algorithm``, and the parameters of each of the ``baselines`` (``verifier``, ``drafter``: that model alone): a list of values
    is a grid."""

    experiment_name: str
    drafter: str
    verifier: str
    algorithm: str
    model_params: dict[str, Any]
    datasets: dict[str, DataSet]
    seeds: list[int]
    metrics: Metrics = field(default_factory=Metrics)
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)
    batch_size: int = 1
    registry: str | None = None
    device: str = "auto"
    dtype: str = "auto"


def find(name: str) -> Path:
    """A configuration by its path, or by the name of one that ships."""
    for path in (Path(name), SHIPPED / name, SHIPPED / f"{name}.json"):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.json")))
    raise UserError(f"config {name!r} is no file. Allowed: a JSON file, or one that ships: {shipped}")


def load(name: str) -> Config:
    """The checked configuration. Raises `UserError` that names the file and the key."""
    path = find(name)
    values = _inherited(path, ())
    config = _built(Config, values, path.name)
    _check(config, path.name)
    if config.registry is not None:
        config = dataclasses.replace(config, registry=str((path.parent / config.registry).resolve()))
    return config


def _inherited(path: Path, below: tuple[Path, ...]) -> dict:
    """The file's values over those of the file that it ``inherits``, which is beside it or ships."""
    if path.resolve() in below:
        raise UserError(f"config {path.name}: inherits itself. Allowed: a file that does not lead back here")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"config {str(path)!r} cannot be read as JSON ({error}). Allowed: a JSON file") from error
    if not isinstance(values, dict):
        raise UserError(f"config {path.name} is {type(values).__name__}. Allowed: a JSON object")
    parent = values.pop("inherits", None)
    if parent is None:
        return _merged({}, values)
    beside = path.parent / str(parent)
    return _merged(_inherited(beside if beside.is_file() else find(str(parent)), (*below, path.resolve())), values)


def _merged(base: Mapping, over: Mapping) -> dict:
    """Mappings are laid over each other, anything else is replaced; null takes a value away."""
    found = dict(base)
    for key, value in over.items():
        if value is None:
            found.pop(key, None)
        elif isinstance(value, dict):
            found[key] = _merged(found[key] if isinstance(found.get(key), dict) else {}, value)
        else:
            found[key] = value
    return found


def _built(kind: Any, value: Any, where: str) -> Any:
    """``value`` as ``kind``, a dataclass, a list, a dict, or a plain type."""
    if kind is Any:
        return value
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = [k for k in get_args(kind) if k is not type(None)]
        return None if value is None else _built(kind, value, where)
    if dataclasses.is_dataclass(kind):
        return _built_fields(kind, value, where)
    plain = get_origin(kind) or kind
    if not isinstance(value, (int, float) if plain is float else plain) or (
        isinstance(value, bool) and plain is not bool
    ):
        raise UserError(f"config {where} is {value!r}. Allowed: {_shown(plain)}")
    if plain is list:
        (item,) = get_args(kind)
        return [_built(item, v, f"{where}[{k}]") for k, v in enumerate(value)]
    if plain is dict:
        return {key: _built(get_args(kind)[1], v, f"{where}: {key}") for key, v in value.items()}
    return value


def _built_fields(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"config {where} is {value!r}. Allowed: an object")
    hints = get_type_hints(kind)
    for key in value:
        if key not in hints:
            raise unknown_name(f"key in config {where}:", key, hints)
    for f in dataclasses.fields(kind):
        if f.name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"config {where}: {f.name} is missing. Allowed: {_shown(hints[f.name])}")
    return kind(**{key: _built(hints[key], v, f"{where}: {key}") for key, v in value.items()})


def _shown(kind: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
        bool: "true or false",
    }
    return names.get(get_origin(kind) or kind, "an object")


def _check(config: Config, where: str) -> None:
    """Raise `UserError` for what fits its type and cannot be."""

    def refuse(key: str, value: Any, allowed: str) -> None:
        raise UserError(f"config {where}: {key} is {value!r}. Allowed: {allowed}")

    for name in config.datasets:
        if name not in NAMES:
            raise unknown_name(f"data set in config {where}: datasets:", name, NAMES)
    for name in config.baselines:
        if name not in ROLES:
            raise unknown_name(f"baseline in config {where}: baselines:", name, ROLES)
    positive = {"batch_size": config.batch_size}
    positive |= {f"datasets: {name}: limit": data.limit for name, data in config.datasets.items()}
    speed, bound, diversity = config.metrics.speed, config.metrics.held_out_bound, config.metrics.diversity
    if speed:
        positive |= {f"metrics: speed: batch_sizes[{k}]": n for k, n in enumerate(speed.batch_sizes)}
        positive["metrics: speed: problems"] = speed.problems
    if bound:
        positive |= {"metrics: held_out_bound: draws": bound.draws, "metrics: held_out_bound: problems": bound.problems}
    if diversity:
        positive |= {f"metrics: diversity: distinct_n[{k}]": n for k, n in enumerate(diversity.distinct_n)}
        if diversity.self_bleu < 0:
            refuse("metrics: diversity: self_bleu", diversity.self_bleu, "0 or more")
    for key, value in positive.items():
        if value is not None and value < 1:
            refuse(key, value, "at least 1")
    if not 0 < config.metrics.accuracy.confidence < 1:
        refuse("metrics: accuracy: confidence", config.metrics.accuracy.confidence, "between 0 and 1")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds) or min(config.seeds) < 0:
        refuse("seeds", config.seeds, "at least one, none twice, none below 0")
    if not config.datasets:
        refuse("datasets", {}, f"at least one of {', '.join(NAMES)}")
    for key, params in (
        ("model_params", config.model_params),
        *((f"baselines: {n}", p) for n, p in config.baselines.items()),
    ):
        if any(value == [] for value in params.values()):
            refuse(key, params, "lists with a value at least")


def grid(params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every choice of one value from each list."""
    values = [v if isinstance(v, list) else [v] for v in params.values()]
    return [dict(zip(params, chosen, strict=True)) for chosen in product(*values)]


def as_data(config: Config) -> dict[str, Any]:
    """The configuration as plain data."""
    return dataclasses.asdict(config)
