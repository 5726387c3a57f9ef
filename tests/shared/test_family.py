"""What a family says of itself is true, and is found from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared import family as described
from shared.errors import UserError
from shared.family import (
    FAMILIES,
    Adapter,
    Decoder,
    DecoderSetting,
    Family,
    Network,
    default_family,
    family_named,
    imported,
)
from tests import programs

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_what_a_family_names_is_there(name):
    family = FAMILIES[name]
    assert family.name == name
    assert family.folder.samefile(Path(imported(f"{family.package}:__file__")).parent)
    for network in family.networks.values():
        for model_type, choice in getattr(network, "choices", {}).items():
            assert choice.model_class.config_class.model_type == model_type
            assert choice.scoring is None or callable(imported(choice.scoring))
    for timed in [t for first in family.timed.values() for t in (first, *first.others.values())]:
        assert callable(imported(timed.forwards))
        assert imported(timed.kinds)(family.block_length)
    for training in family.trains.values():
        assert callable(imported(training.objective))
    assert set(family.timed) | set(family.trains) <= set(family.networks)
    assert all(set(roles) <= set(family.networks) for roles in [*family.shapes.values(), *family.shipped.values()])


@pytest.mark.parametrize("name", list(FAMILIES))
def test_what_a_family_trains_is_there(name):
    family = FAMILIES[name]
    for role, training in family.trains.items():
        assert set(training.others) <= set(getattr(family.networks[role], "choices", ()))
        for each in (training, *training.others.values()):
            assert callable(imported(each.objective))
            assert each.options is None or each.options_class()


@pytest.mark.parametrize("name", list(FAMILIES))
def test_decoders_and_settings_fit_together(name):
    family = FAMILIES[name]
    for decoder in family.decoders.values():
        assert callable(decoder.generate)
        for preset in imported(decoder.presets):
            decoder.options_class.from_flat(decoder.preset(preset))
        with pytest.raises(UserError, match="unknown preset"):
            decoder.preset("no such")
    for setting in (family.baseline, family.plain, family.exact):
        family.decoders[setting.decoder].options_class.from_flat(dict(setting.options))


def test_unknown_families_and_the_default_one(monkeypatch):
    assert default_family() in FAMILIES
    with pytest.raises(UserError, match="unknown family 'SADR'; did you mean SDAR"):
        family_named("SADR")
    monkeypatch.setattr(described, "FAMILIES", {})
    with pytest.raises(UserError, match="no family is installed"):
        family_named("SDAR")


def test_a_family_is_imported_when_it_is_asked_for():
    found = described.Families()
    assert set(found) == set(FAMILIES)
    assert "SDAR" in found
    assert not found._loaded
    assert found["SDAR"] is FAMILIES["SDAR"]
    assert list(found._loaded) == ["SDAR"]


def family_of_three(tmp_path: Path) -> Family:
    """Three networks and an adapter; what ships is a folder each, and a checkpoint of another family."""
    networks = {
        "target": Network("a:T", "t"),
        "drafter": Network("a:D", "d"),
        "second": Network("a:D", "d"),
        "patch": Adapter("drafter"),
    }
    decoders = {"all": Decoder("a:all", "a:O", "a:P"), "one": Decoder("a:one", "a:O", "a:P", ("target",)),
                "two": Decoder("a:two", "a:O", "a:P", ("target", "drafter"))}  # fmt: skip
    shipped = {"tiny": {"target": "SDAR/tiny", "drafter": "tiny/drafter", "second": "tiny/second"}}
    return Family("Three", "three", networks, decoders, DecoderSetting("one"), DecoderSetting("all"), shipped=shipped)


def test_roles(tmp_path, monkeypatch):
    (tmp_path / "three" / "tiny" / "drafter").mkdir(parents=True)
    (tmp_path / "three" / "tiny" / "second").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    family = family_of_three(tmp_path)
    assert family.first == "target"
    assert [family.roles_of(d) for d in ("all", "one", "two")] == [
        ("target", "drafter", "second", "patch"), ("target",), ("target", "drafter", "patch")]  # fmt: skip
    folder = tmp_path / "three" / "tiny"
    assert family.checkpoints("tiny") == {
        "target": "SDAR/tiny",
        "drafter": str(folder / "drafter"),
        "second": str(folder / "second"),
    }
    assert family.tiny == "SDAR/tiny"
    assert family.shipped_folder("tiny/drafter") == folder / "drafter"
    d2f = FAMILIES["D2F"]
    assert d2f.shipped_folder("llada") == d2f.folder / "tiny/llada", "a network and its adapter"
    assert d2f.shipped_folder("tiny/llada/adapter") == d2f.folder / "tiny/llada/adapter"
    assert family.shipped_folder("tiny") is None, "no single checkpoint has this name"
    assert family.shipped_folder("tiny/target") is None
    with pytest.raises(UserError, match="unknown shipped checkpoint of Three 'tinny'; did you mean tiny"):
        family.checkpoints("tinny")


def test_shipped_checkpoints_have_names_in_any_folder(tmp_path):
    """Another process in another folder, which has no such path; a folder that is there goes first."""
    program = (
        "from shared.network.loading import checkpoint_folder, load_tokenizer\n"
        "from shared.errors import UserError\n"
        "print(*(checkpoint_folder(n) for n in ('SDAR/tiny', 'Fast-dLLM-v2/tiny', 'LLaDA2/tiny')), sep='\\n')\n"
        "from sdar import SDARForCausalLM\n"
        "print(SDARForCausalLM.from_pretrained('SDAR/tiny').folder, load_tokenizer('SDAR/tiny').mask_token)\n"
        "try: checkpoint_folder('SDAR/tiny/more')\n"
        "except UserError as error: print(error)\n"
    )
    (tmp_path / "program.py").write_text(program)
    run = lambda: programs.run(["program.py"], tmp_path)  # noqa: E731
    done = run()
    assert done.returncode == 0, done.stderr
    first, second, third, loaded, error = done.stdout.splitlines()
    assert [Path(p) for p in (first, second, third)] == [ROOT / f / "tiny" for f in ("SDAR", "Fast-dLLM-v2", "LLaDA2")]
    assert loaded == f"{ROOT / 'SDAR' / 'tiny'} <|MASK|>"
    assert "one that ships here (D2F/llada, D2F/dream, Fast-dLLM-v2/tiny, LLaDA2/tiny, MDLM-DVD/tiny, SDAR/tiny)" in error
    (tmp_path / "SDAR" / "tiny").mkdir(parents=True)
    assert "the folder has no config.json" in run().stderr


def test_scripts_take_a_shipped_name_in_any_folder(tmp_path):
    call = ["--model", "tiny", "--prompt", "Count from 1 to 3.", "--max_new_tokens", "4", "--device", "cpu"]
    for model in ("tiny", "SDAR/tiny"):
        call[1] = model
        done = programs.run([str(ROOT / "SDAR" / "generate.py"), *call], tmp_path)
        assert done.returncode == 0, done.stderr
        assert "forwards/token" in done.stdout
