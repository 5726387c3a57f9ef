"""Checkpoints of roles, and the models made of them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from shared import family as described
from shared.errors import UserError
from shared.family import FAMILIES, Adapter, Decoder, DecoderSetting, Family, Network
from shared.scripts import models
from shared.scripts.models import (
    check_roles,
    checkpoints_of,
    family_of_checkpoint,
    load_models,
    model_type,
    other_models,
)


def kind(name: str):
    """A class whose ``from_pretrained`` only writes down what it was asked for."""
    return SimpleNamespace(from_pretrained=lambda source, **how: (name, source, how))


Target, Drafter, Newer = kind("Target"), kind("Drafter"), kind("Newer")
HERE = "tests.shared.scripts.made_up"
FAMILY = Family(
    "Three",
    "three",
    {"target": Network(f"{HERE}:Target", "t"), "drafter": Network(f"{HERE}:Drafter", "d", others=(Network(f"{HERE}:Newer", "n"),)), "patch": Adapter("drafter")},
    {"all": Decoder("a:f", "a:O", "a:P"), "one": Decoder("a:f", "a:O", "a:P", ("target",))},
    DecoderSetting("one"),
    DecoderSetting("all"),
    shipped={"tiny": {"target": "SDAR/tiny", "drafter": "Fast-dLLM-v2/tiny"}},
)  # fmt: skip


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])
    monkeypatch.setattr(Family, "folder", property(lambda self: models.Path("/nowhere")))


def checkpoint(folder, model_type: str) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return str(folder)


def test_a_checkpoint_for_every_role(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoints_of(FAMILY, "x/y") == {"target": "x/y"}
    assert checkpoints_of(FAMILY, "x/y", {"drafter": "d"}) == {"target": "x/y", "drafter": "d"}
    whole = {"target": "SDAR/tiny", "drafter": "Fast-dLLM-v2/tiny"}
    assert checkpoints_of(FAMILY, "Three/tiny") == checkpoints_of(FAMILY, "tiny") == whole
    assert checkpoints_of(FAMILY, "Three/tiny", {"drafter": "d"}) == {**whole, "drafter": "d"}
    checkpoint(tmp_path / "tiny", "t")
    assert checkpoints_of(FAMILY, "tiny") == {"target": "tiny"}, "a folder that is here goes first"
    with pytest.raises(UserError, match="unknown role of Three 'draftr'; did you mean drafter"):
        checkpoints_of(FAMILY, "x/y", {"draftr": "d"})


def test_a_decoder_needs_its_roles():
    check_roles(FAMILY, "one", {"target": "t"})
    with pytest.raises(UserError, match=r"drafter is missing. Allowed with decoder 'all' of Three: drafter=CHECKPOINT"):
        check_roles(FAMILY, "all", {"target": "t"})


def test_models_are_of_the_class_of_their_checkpoint_with_adapters_in_them(tmp_path):
    drafter = checkpoint(tmp_path / "drafter", "n")
    checkpoints = {"target": "t", "drafter": drafter, "patch": "p"}
    found = load_models(FAMILY, checkpoints, dtype="float32", device="cpu")
    how = {"dtype": "float32", "device": "cpu"}
    assert found == {"target": ("Target", "t", how), "drafter": ("Newer", drafter, {**how, "patch": "p"})}
    assert other_models(FAMILY, "all", found) == {"drafter": found["drafter"]}
    assert other_models(FAMILY, "one", found) == {}
    with pytest.raises(UserError, match=r"model_type 'x'\. Allowed here: d, n"):
        load_models(FAMILY, {"drafter": checkpoint(tmp_path / "strange", "x")})


def test_the_family_of_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    twin = Family("Twin", "twin", {"target": Network("a:T", "t")}, {}, DecoderSetting(""), DecoderSetting(""))
    known = {**FAMILIES, "Three": FAMILY, "Twin": twin}
    monkeypatch.setattr(models, "FAMILIES", known)
    monkeypatch.setattr(described, "FAMILIES", known)
    assert family_of_checkpoint("SDAR/tiny") == "SDAR"
    assert family_of_checkpoint("Three/tiny") == "Three"
    assert family_of_checkpoint(checkpoint(tmp_path / "a", "llada2_moe")) == "LLaDA2"
    with pytest.raises(UserError, match=r"several families\. Allowed: family= Three or Twin"):
        family_of_checkpoint(checkpoint(tmp_path / "b", "t"))
    with pytest.raises(UserError, match=r"'qwen9'\. Allowed: .*sdar \(SDAR\).*or give family="):
        family_of_checkpoint(checkpoint(tmp_path / "c", "qwen9"))


def test_a_damaged_config_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: not readable as JSON"):
        model_type(tmp_path)
