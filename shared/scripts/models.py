"""The models of a family from the checkpoints of its roles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from shared.errors import UserError, unknown_name
from shared.family import FAMILIES, Adapter, Family, Network
from shared.network.loading import CheckpointModel, checkpoint_folder, read_json


def model_type(source: str | Path) -> str | None:
    """The ``model_type`` in the config.json of a checkpoint."""
    return read_json(checkpoint_folder(source) / "config.json").get("model_type")


def family_of_checkpoint(source: str | Path) -> str:
    """The family whose first network has the ``model_type`` of the checkpoint; `UserError` where none has, or several."""
    named, _, part = str(source).partition("/")
    if named in FAMILIES and part in FAMILIES[named].shipped and not (Path(source) / "config.json").is_file():
        return named
    types = {name: _first(family).choices for name, family in FAMILIES.items()}
    found = model_type(source)
    owners = [name for name, choices in types.items() if found in choices]
    if len(owners) == 1:
        return owners[0]
    if owners:
        raise UserError(
            f"model {str(source)!r} is of model_type {found!r}, as are those of several families. Allowed: family= "
            f"{' or '.join(owners)}"
        )
    known = ", ".join(f"{t} ({name})" for name, choices in types.items() for t in choices)
    raise UserError(f"model {str(source)!r} is of model_type {found!r}. Allowed: {known}; or give family=")


def _first(family: Family) -> Network:
    return family.networks[family.first]


def checkpoints_of(family: Family, source: str | Path, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """A checkpoint for every role that has one: all roles of a shipped checkpoint, or ``source`` for the first role; ``given`` on top, by role."""
    given, name = dict(given or {}), str(source).removeprefix(f"{family.name}/")
    for role in given:
        if role not in family.networks:
            raise unknown_name(f"role of {family.name}", role, family.networks)
    if name in family.shipped and not (Path(source) / "config.json").is_file():
        return family.checkpoints(name) | given
    return {family.first: str(source)} | given


def check_roles(family: Family, decoder: str, checkpoints: Mapping[str, str]) -> None:
    """Raise `UserError` unless every network that the decoder needs has a checkpoint."""
    for role in family.roles_of(decoder):
        if role not in checkpoints:
            raise UserError(f"{role} is missing. Allowed with decoder {decoder!r} of {family.name}: {role}=CHECKPOINT")


def check_models(
    family: Family, checkpoints: Mapping[str, str], *, dtype: torch.dtype | str = "auto", device="cpu"
) -> dict[str, CheckpointModel]:
    """Raise the `UserError` that `load_models` would, without reading a weight; the network of every role, on meta."""
    return _each(family, checkpoints, lambda kind: kind.check_pretrained, dtype=dtype, device=device)


def load_models(
    family: Family, checkpoints: Mapping[str, str], *, dtype: torch.dtype | str = "auto", device="cpu"
) -> dict[str, CheckpointModel]:
    """The network of every role in ``checkpoints``, its adapters in it."""
    return _each(family, checkpoints, lambda kind: kind.from_pretrained, dtype=dtype, device=device)


def _each(family: Family, checkpoints: Mapping[str, str], door: Callable, **how: object) -> dict[str, CheckpointModel]:
    """What ``door(network class)`` gives for every role with a network, called with its checkpoint and those of its adapters."""
    models = {}
    for role, source in checkpoints.items():
        network = family.networks[role]
        if isinstance(network, Network):
            laid_on = {r: n.on for r, n in family.networks.items() if isinstance(n, Adapter)}
            adapters = {r: checkpoints[r] for r, on in laid_on.items() if on == role and r in checkpoints}
            models[role] = door(network_of(network, source).model_class)(source, **how, **adapters)
    return models


def network_of(network: Network, source: str | Path) -> Network:
    """Of the networks that may stand in one place, that of the checkpoint."""
    if not network.others:
        return network
    found = model_type(source)
    if found not in network.choices:
        raise UserError(f"model {str(source)!r} is of model_type {found!r}. Allowed here: {', '.join(network.choices)}")
    return network.choices[found]


def other_models(family: Family, decoder: str, models: Mapping[str, CheckpointModel]) -> dict[str, CheckpointModel]:
    """The keywords under which a decoder is given the models beside the first."""
    return {r: models[r] for r in family.roles_of(decoder) if r in models and r != family.first}
