"""registry.yaml: which models and algorithms there are, and the user's scripts that hold their functions."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mdlm_dvd.src.model import ModelBroker, Pool
from shared.errors import UserError, unknown_name

HOME = Path(__file__).parents[1]
ALIASES = {"baseline": "baseline_cascade", "threshold": "threshold_verifier"}
_MODEL = {"name", "path", "init_func", "tokenizer_func", "gen_func", "model_id"}
_ALGORITHM = {"name", "path", "step_func"}
_OPTIONAL = {"available_models": {"kwargs", "family", "cache", "chat", "adapter"}, "available_algorithms": {"kwargs"}}
_SECTIONS = {"available_models": _MODEL, "available_algorithms": _ALGORITHM}


@dataclass(frozen=True)
class Algorithm:
    """``step`` is a step function of either published form; ``kwargs`` are what its registry entry gives it."""

    name: str
    step: Callable[..., dict]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class ModelRegistry:
    """A registry file, checked when it is read; paths in it are relative to it. ``home/NAME`` checkpoints are looked for there too."""

    def __init__(self, path: str | Path | None = None):
        self.path = HOME / "registry.yaml" if path is None else Path(path)
        self.home = self.path.parent.resolve()
        sections = self._read()
        self.models = self._entries(sections, "available_models")
        self.algorithms = self._entries(sections, "available_algorithms")
        self._states: dict[str, dict] = {}

    def _read(self) -> dict:
        try:
            found = yaml.safe_load(self.path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"registry {str(self.path)!r} cannot be read ({error.strerror}). Allowed: a registry.yaml"
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(
                f"registry {str(self.path)!r} is not YAML ({str(error).splitlines()[0]}). Allowed: a registry.yaml"
            ) from error
        if not isinstance(found, dict):
            raise self._wrong("", "is no mapping", " and ".join(_SECTIONS))
        for key in found:
            if key not in _SECTIONS:
                raise unknown_name(f"key of {self.path.name}", key, _SECTIONS)
        return found

    def _wrong(self, where: str, what: str, allowed: str) -> UserError:
        return UserError(f"{self.path.name}{where and ': '}{where} {what}. Allowed: {allowed}")

    def _entries(self, sections: dict, section: str) -> dict[str, dict]:
        entries, needed = sections.get(section) or [], _SECTIONS[section]
        if not isinstance(entries, list):
            raise self._wrong(section, "is no list", "a list of entries")
        found: dict[str, dict] = {}
        for k, entry in enumerate(entries):
            where = f"{section}[{k}]"
            if not isinstance(entry, dict):
                raise self._wrong(where, "is no mapping", ", ".join(sorted(needed)))
            for key in entry:
                if key not in needed | _OPTIONAL[section]:
                    raise unknown_name(f"key of {self.path.name}: {where}", key, sorted(needed | _OPTIONAL[section]))
            for key in sorted(needed):
                if not isinstance(entry.get(key), str):
                    raise self._wrong(f"{where}.{key}", "is missing" if key not in entry else "is no text", "a text")
            if entry["name"] in found:
                raise self._wrong(f"{where}.name", f"{entry['name']!r} is there twice", "one entry a name")
            if not (self.home / entry["path"]).is_file():
                raise self._wrong(f"{where}.path", f"{entry['path']!r} is no file", "a path relative to the registry")
            if not isinstance(entry.get("kwargs") or {}, dict):
                raise self._wrong(f"{where}.kwargs", "is no mapping", "names and values")
            found[entry["name"]] = entry
        return found

    def model(self, name: str) -> dict:
        """The entry of a model."""
        if name not in self.models:
            raise unknown_name("model", name, self.models)
        return self.models[name]

    def load(self, name: str, role: str, pool: Pool | None = None, **given) -> ModelBroker:
        """A broker for the model ``name`` in ``role``; ``given`` (``device``, ``dtype``, ...) may be asked for by its init function. A model that both roles
        name is loaded once."""
        entry, pool = self.model(name), pool or Pool()
        module = self._module(entry, ("init_func", "tokenizer_func", "gen_func"))
        model_id = entry["model_id"]
        if (self.home / model_id).is_dir():
            model_id = str((self.home / model_id).resolve())
        config = {**entry, **given, "model_id": model_id, "registry_id": name}
        try:
            broker = ModelBroker(module, config, role, pool, self._states.get(name))
        except UserError as error:
            if "the hub did not give it" not in str(error):
                raise
            raise UserError(
                f"{role} {name!r}: {error}. Allowed: tiny_drafter and tiny_verifier, which ship here"
            ) from error
        self._states[name] = broker.model_state
        return broker

    def algorithm(self, name: str) -> Algorithm:
        """The algorithm ``name``, or what it is an alias of."""
        name = name if name in self.algorithms else ALIASES.get(name, name)
        if name not in self.algorithms:
            raise unknown_name("algorithm", name, [*self.algorithms, *ALIASES])
        entry = self.algorithms[name]
        module = self._module(entry, ("step_func",))
        return Algorithm(name, getattr(module, entry["step_func"]), entry.get("kwargs") or {})

    def _module(self, entry: Mapping[str, Any], functions: tuple[str, ...]):
        path = (self.home / entry["path"]).resolve()
        module = script(path, self.home)
        for key in functions:
            if not callable(getattr(module, entry[key], None)):
                raise self._wrong(
                    f"{entry['name']}.{key}", f"{entry[key]!r} is no function of {entry['path']}", "one that is"
                )
        return module


def script(path: Path, home: Path):
    """The module of a user's script. While it is imported its registry's folder and ours are searched too, so that ``from algorithms._common import ...``
    works as in the published framework."""
    if path.is_relative_to(HOME):
        return importlib.import_module(".".join(("mdlm_dvd", *path.relative_to(HOME).with_suffix("").parts)))
    name = f"mdlm_dvd_script_{abs(hash(str(path)))}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for it there
    with _searched(home, HOME):
        try:
            spec.loader.exec_module(module)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


@contextmanager
def _searched(*folders: Path):
    before = list(sys.path)
    sys.path[:0] = [str(f) for f in folders]
    try:
        yield
    finally:
        sys.path[:] = before
