"""Arrows point one way: a room of `shared` imports only rooms below it, and nothing in `shared` imports a family, `eval` or `train`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import shared
from shared.family import FAMILIES

ROOT = Path(shared.__file__).parent
ROOMS = ["network", "gpu", "policy", "decode", "scripts"]  # from the bottom up
FILES = sorted(ROOT.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_looks_down(path):
    parts = path.relative_to(ROOT).parts
    level = ROOMS.index(parts[0]) if len(parts) > 1 else -1
    above = {f"shared.{room}" for room in ROOMS[level + 1 :]}
    looked_up = {m for m in imported(path) if any(m == room or m.startswith(f"{room}.") for room in above)}
    assert not looked_up
    users = {"eval", "train", *(family.package for family in FAMILIES.values())}
    assert not {module.split(".")[0] for module in imported(path)} & users


def test_every_room_is_named():
    assert sorted(p.name for p in ROOT.iterdir() if (p / "__init__.py").is_file()) == sorted(ROOMS)
