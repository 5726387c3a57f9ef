"""LoRA adapters merged at load: the arithmetic, what is refused, and whose base it is. On a network of two layers."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d2f.modeling_d2f import LLaDAForD2F
from shared.errors import UserError
from shared.network.adapters import save_adapter
from shared.network.llada import LLaDAConfig

RANK, BASE = 2, "GSAI-ML/LLaDA-8B-Instruct"
SIZES = {"d_model": 8, "n_heads": 2, "n_layers": 2, "mlp_hidden_size": 12, "vocab_size": 16, "embedding_size": 16, "max_sequence_length": 32}  # fmt: skip
TARGETS = ("q_proj", "attn_out")
IDS = torch.tensor([[1, 2, 3]])


def base_in(folder: Path, dtype=torch.float32, seed: int = 0, **config) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LLaDAForD2F(LLaDAConfig(**SIZES, **config)).save_pretrained(folder, dtype=dtype)
    return folder


def tensors() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    names = [f"model.transformer.blocks.{i}.{target}" for i in range(2) for target in TARGETS]
    return {
        f"{name}.lora_{half}.weight": 0.3 * torch.randn(shape, generator=random)
        for name in names
        for half, shape in (("A", (RANK, 8)), ("B", (8, RANK)))
    }


def adapter_in(folder: Path, state: dict | None = None, **config) -> Path:
    plain = {
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(TARGETS),
        "bias": "none",
        "base_model_name_or_path": "../base",
    }
    save_adapter(folder, tensors() if state is None else state, plain | config)
    return folder


@pytest.fixture
def base(tmp_path) -> Path:
    return base_in(tmp_path / "base")


def load(base: Path, adapter: Path, **how) -> LLaDAForD2F:
    """With every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return LLaDAForD2F.from_pretrained(base, adapter=adapter, **how)


def logits(model) -> torch.Tensor:
    return model(IDS, torch.arange(3)[None])


@pytest.mark.parametrize(("alpha", "scale"), [(RANK, 1.0), (5, 2.5), (1, 0.5)])
def test_the_effective_weight(base, tmp_path, alpha, scale):
    """``W + (alpha / r) B A`` for the targets, ``W`` for all others."""
    model = load(base, adapter_in(tmp_path / "adapter", lora_alpha=alpha))
    plain, lora = load_file(base / "model.safetensors"), tensors()
    changed = 0
    for name, weight in model.state_dict().items():
        key = model.checkpoint_key(name)
        want, module = plain[key].double(), key.removesuffix(".weight")
        if f"{module}.lora_A.weight" in lora:
            changed += 1
            want = want + scale * lora[f"{module}.lora_B.weight"].double() @ lora[f"{module}.lora_A.weight"].double()
        assert torch.allclose(weight.double(), want, atol=1e-6), key
    assert changed == 4
    assert model.adapter == tmp_path / "adapter"


def test_it_changes_what_the_network_says_and_no_adapter_does_not(base, tmp_path):
    adapter = adapter_in(tmp_path / "adapter")
    alone = LLaDAForD2F.from_pretrained(base)
    assert alone.adapter is None
    assert (logits(load(base, adapter)) - logits(alone)).abs().max() > 1e-3


def test_a_bfloat16_base_is_rounded_once(tmp_path):
    """The sum is taken in float32, not in bfloat16 step by step."""
    base = base_in(tmp_path / "base", torch.bfloat16)
    model = load(base, adapter_in(tmp_path / "adapter"), dtype="bfloat16")
    plain, lora = load_file(base / "model.safetensors"), tensors()
    key = "model.transformer.blocks.1.q_proj"
    sum_ = plain[f"{key}.weight"].float() + lora[f"{key}.lora_B.weight"] @ lora[f"{key}.lora_A.weight"]
    got = model.model.layers[1].self_attn.q_proj.weight
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, sum_.bfloat16())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bias": "lora_only"}, "bias is 'lora_only'. Allowed: 'none'"),
        ({"use_dora": True}, "use_dora is True. Allowed: False"),
        ({"use_rslora": True}, "use_rslora is True. Allowed: False"),
        ({"modules_to_save": ["wte"]}, "modules_to_save is ['wte']"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is {'q_proj': 8}"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'. Allowed: 'LORA'"),
        ({"r": 0}, "r is 0 and lora_alpha 2"),
        ({"r": 4}, "is [2, 8], [4, 8] is needed"),
        ({"lora_alpha": None}, "lora_alpha None"),
        ({"target_modules": "all-linear"}, "target_modules is 'all-linear'. Allowed: a list of module names"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_kinds_that_are_not_served(base, tmp_path, config, message):
    with pytest.raises(UserError) as error:
        load(base, adapter_in(tmp_path / "adapter", **config))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_tensor_is_named(base, tmp_path):
    state = tensors()
    del state["model.transformer.blocks.1.attn_out.lora_B.weight"]
    with pytest.raises(UserError, match=r"blocks\.1\.attn_out\.lora_B\.weight is missing, \[8, 2\] is needed"):
        load(base, adapter_in(tmp_path / "adapter", state))


def test_a_tensor_too_many_is_named(base, tmp_path):
    more = {"model.transformer.blocks.2.q_proj.lora_A.weight": torch.zeros(RANK, 8)}
    with pytest.raises(UserError, match=r"no place for: model\.transformer\.blocks\.2\.q_proj\.lora_A\.weight"):
        load(base, adapter_in(tmp_path / "adapter", tensors() | more))


def test_files_that_are_not_there(base, tmp_path):
    adapter = adapter_in(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        load(base, adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"the folder has no adapter_config\.json"):
        load(base, adapter)


def test_another_base_is_refused(base, tmp_path):
    """By a path that is told from the adapter's folder; ``force_adapter`` lays it on nevertheless."""
    adapter, other = adapter_in(tmp_path / "adapter"), base_in(tmp_path / "other", seed=2)
    assert load(base, adapter).adapter == adapter
    with pytest.raises(
        UserError, match=r"was trained on '\.\./base', not on .*other.* Allowed: its own base, or --force_adapter"
    ):
        load(other, adapter)
    forced = load(other, adapter, force_adapter=True)
    assert not torch.equal(logits(forced), logits(LLaDAForD2F.from_pretrained(other)))


def in_hub_cache(root: Path, name: str) -> Path:
    """A base as the hub's cache keeps it."""
    return base_in(root / f"models--{name.replace('/', '--')}" / "snapshots" / "abc")


def test_a_base_in_the_hub_cache_is_known_by_its_folder(tmp_path):
    adapter = adapter_in(tmp_path / "adapter", base_model_name_or_path=BASE)
    load(in_hub_cache(tmp_path, BASE), adapter)
    wrong = in_hub_cache(tmp_path, "GSAI-ML/LLaDA-8B-Base")
    with pytest.raises(UserError, match=f"was trained on '{BASE}'"):
        load(wrong, adapter)
    load(wrong, adapter, force_adapter=True)


def test_a_base_is_known_by_the_name_in_its_config(tmp_path):
    adapter, base = adapter_in(tmp_path / "adapter", base_model_name_or_path=BASE), base_in(tmp_path / "mine")
    path = base / "config.json"
    for name, fits in ((BASE, True), ("GSAI-ML/LLaDA-8B-Base", False)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": name}))
        if fits:
            load(base, adapter)
        else:
            with pytest.raises(UserError, match="--force_adapter"):
                load(base, adapter)


@pytest.mark.parametrize("name", [BASE, None, ""])
def test_an_unknown_base_warns(base, tmp_path, name):
    adapter = adapter_in(tmp_path / "adapter", base_model_name_or_path=name)
    with pytest.warns(UserWarning, match="whether .* is its base .* cannot be told"):
        LLaDAForD2F.from_pretrained(base, adapter=adapter)
    load(base, adapter, force_adapter=True)


def test_a_shipped_pair_that_was_copied_is_still_a_pair(base, tmp_path):
    adapter_in(tmp_path / "base" / "adapter", base_model_name_or_path="..")
    copied = shutil.copytree(base, tmp_path / "copy")
    load(copied, copied / "adapter")
    with pytest.raises(UserError, match="was trained on"):
        load(copied, base / "adapter")
