"""What a family says of itself, and which families are installed. `eval` and `train` read this, so that neither names a family.

Everything heavy is a ``module:name`` and imported when it is asked for. A family is found by its entry point in the group `GROUP`, from any folder:

    [project.entry-points."draft_and_verify.families"]
    SDAR = "sdar.family:FAMILY"
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from shared.errors import UserError, unknown_name

GROUP = "draft_and_verify.families"
DEFAULT = "draft_and_verify.default"  # the family taken where none is named


def imported(target: str) -> Any:
    """What ``module:name`` stands for."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True, slots=True)
class Network:
    """``model`` is a `shared.network.loading.CheckpointModel`, ``model_type`` that of its checkpoints' config.json, ``scoring`` the function of
    `shared.network.scoring` that fits it (None: it scores nothing). Checkpoints of ``others`` may stand in its place."""

    model: str
    model_type: str
    scoring: str | None = None
    others: tuple[Network, ...] = ()

    @property
    def model_class(self) -> type:
        return imported(self.model)

    @property
    def choices(self) -> dict[str, Network]:
        """The networks that may stand here, by ``model_type``."""
        return {n.model_type: n for n in (self, *self.others)}


@dataclass(frozen=True, slots=True)
class Adapter:
    """Weights laid on the network of role ``on``, whose ``from_pretrained`` takes their checkpoint under the name of this role."""

    on: str


@dataclass(frozen=True, slots=True)
class Decoder:
    """``function`` decodes, with options of the class ``options``; ``presets`` is its table of named settings.

    It is called as ``function(model, prompts, options, **call)``. ``roles``: the networks it needs (None: all of the family); the first is ``model``, each
    of the others goes by the keyword of its role.
    """

    function: str
    options: str
    presets: str
    roles: tuple[str, ...] | None = None

    @property
    def generate(self) -> Callable:
        return imported(self.function)

    @property
    def options_class(self) -> type:
        return imported(self.options)

    def preset(self, name: str) -> dict:
        presets = imported(self.presets)
        if not isinstance(name, str) or name not in presets:
            raise unknown_name("preset", name, presets)
        return presets[name]


@dataclass(frozen=True, slots=True)
class DecoderSetting:
    """A decoder by name, with options."""

    decoder: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Timed:
    """What the benchmark times of a network: ``forwards(block_length, device)`` are the `shared.network.timed.Forward` worth timing, ``kinds(block_length)``
    the `shared.gpu.graphs.Shape` that its decoders have captured. ``others``: of networks that may stand in its place, by ``model_type``."""

    forwards: str
    kinds: str
    others: Mapping[str, Timed] = field(default_factory=dict)

    def of(self, model: Any) -> Timed:
        """What is timed of this network."""
        return self.others.get(model.config.model_type, self)


@dataclass(frozen=True, slots=True)
class Training:
    """What `train` makes: a network of ``config``, by ``objective(model, mask_id, seed)``, which returns a `train.loop.Objective`; ``about`` names it.

    ``sizes``: configuration by the name of a size, where the family's differ from those of `train.recipes`. ``others``: what differs for a network of
    `Network.others`, by its ``model_type``. ``options``: a `shared.options.FlatOptions` whose fields are flags; an object of it is then the fourth
    argument of the objective. ``from_prompt``: are blocks counted from the end of the prompt? ``more_padding``: up to so many blocks of 32 more are trained
    behind an answer, for decoders that are told how long a text will be.
    """

    objective: str
    about: str
    config: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, Any]] | None = None
    others: Mapping[str, Training] = field(default_factory=dict)
    options: str | None = None
    from_prompt: bool = False
    more_padding: int = 0

    def of_type(self, model_type: str) -> Training:
        """That of the network with this ``model_type``."""
        return self.others.get(model_type, self)

    @property
    def options_class(self) -> type | None:
        return None if self.options is None else imported(self.options)


@dataclass(frozen=True, slots=True)
class Family:
    """A family: ``networks`` by role, the first of which is the model that its texts are judged by; ``decoders`` by name, the first of which is the default.

    ``baseline`` is what the others are compared with, ``plain`` decodes without verifying (None: it has no such decoder), ``exact`` makes speculation lossless,
    and ``method`` is what its speculation is called. ``shapes`` are released checkpoints: configurations by role, with a ``model_type`` where that is not the
    first one's. ``timed`` and ``trains`` go by role.
    ``shipped``: checkpoints by name, each a folder inside ``package`` (or a checkpoint's name) for every role. ``block_length`` is the benchmark's.
    """

    name: str
    package: str
    networks: Mapping[str, Network | Adapter]
    decoders: Mapping[str, Decoder]
    baseline: DecoderSetting
    exact: DecoderSetting
    plain: DecoderSetting | None = None
    method: str = "speculative"
    shapes: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    timed: Mapping[str, Timed] = field(default_factory=dict)
    trains: Mapping[str, Training] = field(default_factory=dict)
    shipped: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    block_length: int = 32

    @property
    def first(self) -> str:
        """The role of the model that texts are judged by."""
        return next(iter(self.networks))

    @property
    def folder(self) -> Path:
        """Where its package lies. Does not import it."""
        return Path(next(iter(importlib.util.find_spec(self.package).submodule_search_locations)))

    @property
    def tiny(self) -> str:
        """Folder of the first role of the first checkpoint that ships with it."""
        return self.checkpoints(next(iter(self.shipped)))[self.first]

    def roles_of(self, decoder: str) -> tuple[str, ...]:
        """The networks that a decoder needs, adapters of them among those."""
        roles = self.decoders[decoder].roles
        if roles is None:
            return tuple(self.networks)
        laid_on = [r for r, n in self.networks.items() if isinstance(n, Adapter) and n.on in roles]
        return (*roles, *laid_on)

    def checkpoints(self, name: str) -> dict[str, str]:
        """The shipped checkpoint ``name``: for each role a folder, or the name of a checkpoint that another family ships."""
        if name not in self.shipped:
            raise unknown_name(f"shipped checkpoint of {self.name}", name, self.shipped)
        return {r: str(self._shipped_path(part) or part) for r, part in self.shipped[name].items()}

    def shipped_folder(self, part: str) -> Path | None:
        """The folder of a shipped checkpoint of one network (adapters beside it do not count), or of one of its roles (``tiny/drafter``); None if no such one
        ships."""
        found = [path for role, path in self.shipped.get(part, {}).items() if isinstance(self.networks[role], Network)]
        if len(found) == 1:
            part = found[0]
        declared = {p for parts in self.shipped.values() for p in parts.values()}
        return self._shipped_path(part) if part in declared else None

    def _shipped_path(self, part: str) -> Path | None:
        path = self.folder / part
        return path if path.is_dir() else None


def shadow_of(module: str) -> str:
    """What is found for the package of a ``module`` that it does not hold."""
    package = module.partition(".")[0]
    spec = importlib.util.find_spec(package)
    where = "not installed" if spec is None else spec.origin or next(iter(spec.submodule_search_locations))
    return f"{package} is {where}, which has no {module}. Allowed: run from another folder, or rename it"


class Families(Mapping[str, Family]):
    """The families that are installed, by name; each is imported when it is first asked for."""

    def __init__(self):
        self._loaded: dict[str, Family] = {}

    @cached_property
    def _points(self) -> dict[str, EntryPoint]:
        return {p.name: p for p in sorted(entry_points(group=GROUP))}

    def __getitem__(self, name: str) -> Family:
        if name not in self._loaded:
            point = self._points[name]
            try:
                self._loaded[name] = point.load()
            except ModuleNotFoundError as error:
                if error.name != point.module:
                    raise
                raise UserError(f"family {name}: {shadow_of(point.module)}") from error
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def __contains__(self, name: object) -> bool:
        return name in self._points


FAMILIES = Families()


def family_named(name: str) -> Family:
    """The family; `UserError` if it is not installed."""
    if not FAMILIES:
        raise UserError("no family is installed. Allowed: `pip install -e .` in the repository tells which there are")
    if name not in FAMILIES:
        raise unknown_name("family", name, FAMILIES)
    return FAMILIES[name]


def default_family() -> str:
    """The name of the family taken where none is named: that of the entry point group `DEFAULT`, else the first."""
    named = [p.name for p in entry_points(group=DEFAULT) if p.name in FAMILIES]
    return next(iter([*named, *FAMILIES]), "")


def shipped_folder(name: str) -> Path | None:
    """The folder of a checkpoint that ships as FAMILY/NAME; None if none does."""
    family, _, part = name.partition("/")
    return FAMILIES[family].shipped_folder(part) if part and family in FAMILIES else None


def shipped_names() -> list[str]:
    """Every shipped checkpoint as FAMILY/NAME."""
    return [f"{name}/{part}" for name, family in FAMILIES.items() for part in family.shipped]
