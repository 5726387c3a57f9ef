"""Families and decoders by what a command line calls them: a checkpoint, a file, a class."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

from shared.errors import UserError, unknown_name
from shared.family import FAMILIES, Network


def split_target(key: str, target: str) -> tuple[Path, str]:
    """``path.py:name`` -> the file, which must be there, and the name."""
    path, _, name = str(target).rpartition(":")
    if not name or not Path(path).is_file():
        raise UserError(f"{key} {target!r}: no such file or no name after it. Allowed: PATH.py:NAME")
    return Path(path).resolve(), name


def decoder_in_file(target: str) -> tuple[str, str] | None:
    """``(family, decoder)`` if ``path.py:function`` is one of ours, None for a user's own file."""
    path, function = split_target("custom_generate", target)
    own: dict[str, tuple[str, str]] = {}
    for name, family in FAMILIES.items():
        for decoder, entry in family.decoders.items():
            file, called = _place(entry.function)
            if path == file:
                own[called] = name, decoder
    if own and function not in own:
        raise unknown_name(f"function of {path.name}", function, own)
    return own.get(function)


def family_of_class(target: str) -> str:
    """The family whose network ``path.py:Class`` is."""
    wanted = split_target("custom_model_class", target)
    known = {_place(network.model): name for name, network in _first_networks()}
    if wanted not in known:
        allowed = ", ".join(f"{file}:{name}" for file, name in known)
        raise UserError(f"custom_model_class {target!r} is none of this repository's networks. Allowed: {allowed}")
    return known[wanted]


def _first_networks() -> Iterator[tuple[str, Network]]:
    for name, family in FAMILIES.items():
        for network in family.networks[family.first].choices.values():
            yield name, network


def _place(target: str) -> tuple[Path, str]:
    """The file and the name behind ``module:name``."""
    module, _, name = target.partition(":")
    return Path(importlib.import_module(module).__file__).resolve(), name
