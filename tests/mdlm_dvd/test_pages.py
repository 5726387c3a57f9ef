"""The pages beside the code: every option is on one, and what they say of the checkpoint and of the root is so."""

from __future__ import annotations

import inspect
import json
import re
import sys

import pytest

from mdlm_dvd import options
from mdlm_dvd.algorithms import dual
from mdlm_dvd.family import FAMILY
from mdlm_dvd.src.registry import ALIASES, HOME, ModelRegistry
from shared.options import FlatOptions

PAGE = (HOME / "OPTIONS.md").read_text(encoding="utf-8")
CLASSES = [
    k for k in vars(options).values() if inspect.isclass(k) and issubclass(k, FlatOptions) and k is not FlatOptions
]
GIVEN = {"drafter", "verifier", "prompts", "step_idx", "total_steps", "algo_state"}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda k: k.__name__)
def test_every_field_is_on_the_page(kind):
    assert [name for name in kind.names() if f"`--{name}`" not in PAGE] == []


def test_every_option_of_dual_is_on_the_page_with_its_default():
    named = {k: p.default for k, p in inspect.signature(dual.run_step).parameters.items() if k not in GIVEN}
    rows = dict(re.findall(r"^\| `--(\w+)` \| (\S+) \|", PAGE.partition("## dual")[2], re.MULTILINE))
    assert named.pop("gen_length") is inspect.Parameter.empty
    assert {name: str(value) for name, value in named.items()} == {k: v for k, v in rows.items() if k in named}


def test_every_algorithm_and_preset_is_on_the_page():
    names = [*ModelRegistry().algorithms, *ALIASES, *FAMILY.decoders]
    names += [p for n, presets in vars(options).items() if n.endswith("_PRESETS") for p in presets]
    assert [name for name in names if f"`{name}`" not in PAGE] == []


def test_the_card_of_the_drafter_names_its_shape():
    folder = HOME / "tiny/drafter"
    card, config = (folder / "README.md").read_text("utf-8"), json.loads((folder / "config.json").read_text("utf-8"))
    for words in (
        f"{config['n_layers']} layers", f"width {config['d_model']}", f"{config['n_heads']} heads",
        f"head_dim {config['head_dim']}", f"feed-forward {config['mlp_hidden_size']}", f"`block_size` {config['block_size']}",
    ):  # fmt: skip
        assert words in card
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size / 1e6:.2f} MB" in card
    assert f"{size / 2e6:.2f} million parameters" in card


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_the_pointer_installs_the_root():
    import tomllib

    pointer, root = (tomllib.loads((folder / "pyproject.toml").read_text("utf-8")) for folder in (HOME, HOME.parent))
    name = root["project"]["name"]
    assert pointer["project"]["dependencies"] == [name]
    source = pointer["tool"]["uv"]["sources"][name]
    assert source == {"path": "..", "editable": True}
    assert (HOME / source["path"]).resolve() == HOME.parent
    assert pointer["tool"]["uv"]["package"] is False, "nothing is built of the folder itself"
    assert pointer["project"]["requires-python"] == root["project"]["requires-python"]
