"""What made a text: options, files of the checkpoint, code. A run that goes on with texts of an earlier one asks what differs."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import shared
from shared.errors import UserError
from shared.network.loading import checkpoint_folder
from shared.scripts.files import write_whole

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
    adapter = (Path(source) / ADAPTER).is_file()
    folder = checkpoint_folder(source, holds=ADAPTER) if adapter else checkpoint_folder(source)
    files = [f for f in sorted(folder.rglob("*")) if f.suffix in READ and f.is_file()]
    return tuple((str(f.relative_to(folder)), *_told_by(f)) for f in files)


def _told_by(file: Path) -> tuple:
    if file.suffix in WEIGHTS:
        return file.stat().st_size, file.stat().st_mtime_ns
    return (hashlib.sha256(file.read_bytes()).hexdigest()[:16],)


def fingerprints(checkpoints: Mapping[str, str]) -> dict[str, tuple]:
    """The same of the checkpoint of every role."""
    return {role: fingerprint(source) for role, source in checkpoints.items()}


def files_of(checkpoints: Mapping[str, str]) -> dict[str, dict[str, list]]:
    """The same by role and name of the file, as settings."""
    return {role: {name: told for name, *told in found} for role, found in fingerprints(checkpoints).items()}


@cache
def code_version(folder: Path) -> str:
    """A hash of the code that decodes: of the family in ``folder`` and of `shared`."""
    found = hashlib.sha256()
    for part in (folder, Path(shared.__file__).parent):
        for file in sorted(part.rglob("*.py")):
            found.update(f"{file.relative_to(part)}\n".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def prompts_as_settings(prompts: Sequence[Sequence[int]]) -> dict[str, str]:
    """A hash of every prompt's ids, by its number."""
    return {str(k): hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:16] for k, ids in enumerate(prompts)}


def difference(kept: Path, made_by: Mapping) -> tuple[str, str, str] | None:
    """The first setting of ``made_by`` that is another in the file ``kept``, its value now and there; None if all are the same or there is no file."""
    if not kept.is_file():
        return None
    try:
        before = dict(_flattened(json.loads(kept.read_text(encoding="utf-8"))))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{kept} is damaged ({error}). Allowed: another folder") from error
    now = dict(_flattened(json.loads(json.dumps(made_by, default=str))))
    key = next((k for k in dict.fromkeys([*now, *before]) if now.get(k) != before.get(k)), None)
    return None if key is None else (key, _shown(now.get(key)), _shown(before.get(key)))


def _shown(value: object) -> str:
    return textwrap.shorten(repr(value), 80, placeholder=" ...")


def _flattened(settings: Mapping, under: str = "") -> Iterator[tuple[str, object]]:
    """Every setting by one name: ``options block_length``."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{under}{key} ")
        else:
            yield f"{under}{key}", value


def note(kept: Path, made_by: Mapping) -> None:
    """Write ``made_by`` to the file ``kept``."""
    write_whole(kept, json.dumps(made_by, default=str, indent=1) + "\n")
