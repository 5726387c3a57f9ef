"""Families and decoders by what a command line calls them: a checkpoint, a file, a class."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import shared
from shared.errors import UserError, unknown_name
from shared.family import FAMILIES, Network
from shared.network.loading import checkpoint_folder

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
READ = (
    *WEIGHTS,
    ".json",
    ".jinja",
    ".model",
    ".txt",
    ".tiktoken",
)  # what loaders read: networks, generation config, tokenizer, chat templates

ADAPTER = "adapter_config.json"  # what makes a folder an adapter, which has no network of its own


@cache
def fingerprint(source: str) -> tuple:
    """What tells the files under a path from those that stood there before: weights by size and time, the small ones by what they say."""
    lora = (Path(source) / ADAPTER).is_file()
    folder = checkpoint_folder(source, *([ADAPTER] if lora else []))
    files = [f for f in sorted(folder.rglob("*")) if f.suffix in READ and f.is_file()]
    return tuple((str(f.relative_to(folder)), *_told_by(f)) for f in files)


def _told_by(file: Path) -> tuple:
    if file.suffix in WEIGHTS:
        return file.stat().st_size, file.stat().st_mtime_ns
    return (hashlib.sha256(file.read_bytes()).hexdigest()[:16],)


@cache
def code_version(family: str) -> str:
    """A hash of the code that decodes: of the family and of `shared`."""
    found = hashlib.sha256()
    for folder in (FAMILIES[family].folder, Path(shared.__file__).parent):
        for file in sorted(folder.rglob("*.py")):
            found.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def fingerprints(checkpoints: Mapping[str, str]) -> dict[str, tuple]:
    """The same of the checkpoint of every role."""
    return {role: fingerprint(source) for role, source in checkpoints.items()}


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
