from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sdar import SDARConfig, SDARForCausalLM
from shared.errors import UserError
from shared.family import FAMILIES
from shared.network.loading import (
    checkpoint_folder,
    load_tokenizer,
    on_meta,
    resolve_device,
    resolve_dtype,
    special_ids,
)
from shared.scripts import tensor_parallel

IDS = torch.tensor([[1, 2, 3]])


def tiny(**config) -> SDARForCausalLM:
    size = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SDARForCausalLM(SDARConfig(**size, head_dim=4, **config))
    return model.eval().requires_grad_(False)


def logits(model: SDARForCausalLM) -> torch.Tensor:
    return model(IDS, torch.arange(3)[None])


@pytest.fixture
def folder(tmp_path):
    tiny().save_pretrained(tmp_path)
    return tmp_path


def edit(folder, change, name: str = "model.safetensors") -> None:
    """Rewrite a weight file through ``change(state)``."""
    state = load_file(folder / name)
    change(state)
    save_file(state, folder / name)


def test_save_and_load(folder):
    want, got = tiny(), SDARForCausalLM.from_pretrained(folder)
    assert got.folder == folder
    assert not got.training
    assert not any(p.requires_grad for p in got.parameters())
    assert torch.equal(logits(got), logits(want))
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float32"


def test_save_in_another_dtype(tmp_path):
    tiny().save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert SDARForCausalLM.from_pretrained(tmp_path).dtype == torch.float32, "auto on a CPU"
    assert SDARForCausalLM.from_pretrained(tmp_path, dtype="bfloat16").dtype == torch.bfloat16
    assert SDARForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).dtype == torch.float64


def test_tied_embeddings(tmp_path):
    tied = tiny(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = SDARForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(tied))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert len(list(loaded.parameters())) == len(list(tied.parameters()))
    assert not loaded.lm_head.weight.requires_grad


def test_a_tied_checkpoint_may_list_its_head(tmp_path):
    tied = tiny(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path)
    edit(tmp_path, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}))
    assert torch.equal(logits(SDARForCausalLM.from_pretrained(tmp_path)), logits(tied))


def test_saving_leaves_the_config_alone(tmp_path):
    model = tiny()
    before = model.config.to_dict()
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.config.to_dict() == before
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_device_auto(folder):
    want = "cuda" if torch.cuda.is_available() else "cpu"
    assert SDARForCausalLM.from_pretrained(folder, device="auto").device.type == want
    with pytest.raises(UserError, match="'gpu0' is not one torch knows"):
        SDARForCausalLM.from_pretrained(folder, device="gpu0")


def shard(folder) -> None:
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in files.items():
        save_file({k: state[k] for k in keys}, folder / file)
    index = {"weight_map": {k: file for file, keys in files.items() for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def test_shards_equal_the_whole(folder):
    whole = logits(SDARForCausalLM.from_pretrained(folder))
    shard(folder)
    assert torch.equal(logits(SDARForCausalLM.from_pretrained(folder)), whole)


def refused(folder, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        SDARForCausalLM.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_shards_that_are_not_there(folder):
    shard(folder)
    (folder / "b.safetensors").unlink()
    refused(folder, "shards that are not there: b.safetensors")
    (folder / "model.safetensors.index.json").write_text("{")
    refused(folder, "not a readable safetensors index")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.norm.weight"), "the checkpoint lacks model.norm.weight"),
        (lambda s: s.pop("lm_head.weight"), "lacks lm_head.weight"),
        (lambda s: [s.pop(k) for k in list(s) if "mlp" in k], "lacks .*mlp.* and 2 more"),
        (lambda s: s.update(adapter=torch.zeros(1)), "tensors this model does not know: adapter"),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(9)}),
            r"model.norm.weight is \[9\], the config asks for \[8\]",
        ),
    ],
    ids=["missing", "missing head", "many missing", "extra", "shape"],
)
def test_tensors_that_do_not_fit(folder, change, message):
    edit(folder, change)
    refused(folder, message)


def test_rotary_buffers_of_old_checkpoints_are_ignored(folder):
    edit(folder, lambda s: s.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}))
    assert torch.equal(logits(SDARForCausalLM.from_pretrained(folder)), logits(tiny()))


def config_of(folder, text: str | None = None, **change) -> None:
    """Rewrite the config: some fields, or all of it."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}) if text is None else text)


def test_a_checkpoint_of_another_model_type(folder):
    config_of(folder, model_type="qwen3")
    refused(folder, "model_type 'qwen3'. Allowed: 'sdar'")


@pytest.mark.parametrize("text", ['{"a": ', "[1]", "\ufffd", ""])
def test_a_damaged_config(folder, text):
    config_of(folder, text)
    refused(folder, "config.json: (not readable as JSON|a JSON object is needed, list found)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "8"}, r"hidden_size is '8'\. Allowed: a whole number, at least 1$"),
        ({"torch_dtype": "half a float"}, "torch_dtype is 'half a float'. Allowed: null, float32"),
        ({"torch_dtype": 16}, "torch_dtype is '16'. Allowed: null, float32"),
        ({"quantization_config": "awq"}, r"quantization_config is there \('awq'\)"),
        ({"num_labels": "x"}, "config.json cannot be used .*TypeError"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_built_is_one_line(folder, change, message):
    config_of(folder, **change)
    refused(folder, rf"^[^\n]*{message}")


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_a_damaged_index(folder, text):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, "not a readable safetensors index")


@pytest.mark.parametrize("keep", [0, 4, 100, -5])
def test_a_damaged_weight_file(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "damaged")


def test_folders_without_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"no config.json"):
        checkpoint_folder(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        checkpoint_folder(tmp_path / "absent")
    for name in ("absent", "./a/b", "a/b/c", "~/absent"):
        with pytest.raises(UserError, match="no such folder"):
            checkpoint_folder(name)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sdar", "vocab_size": 8}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"no model.safetensors"):
        SDARForCausalLM.from_pretrained(tmp_path)


def test_a_hub_id_is_downloaded(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **k: asked.append((name, k)) or str(folder))
    assert checkpoint_folder("JetLM/SDAR-8B-Chat") == folder
    ((name, flat),) = asked
    assert name == "JetLM/SDAR-8B-Chat"
    assert not any("py" in pattern or "bin" in pattern for pattern in flat["allow_patterns"])


def test_a_revision_is_of_a_hub_id(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **k: asked.append((name, k)) or str(folder))
    assert checkpoint_folder("some/model", "v2") == folder
    assert asked[0][1]["revision"] == "v2"
    for place in (str(folder), "SDAR/tiny"):
        with pytest.raises(UserError, match=r"revision is 'v2', but '.*' is a folder. Allowed: with a hub id alone"):
            checkpoint_folder(place, "v2")
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=r"the hub did not give it of revision 'v2' \(ZeroDivisionError"):
        checkpoint_folder("some/model", "v2")


def test_a_hub_id_without_network(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route to host\nand a page of detail")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"'some/model': .*ConnectionError: no route to host\)$"):
        checkpoint_folder("some/model")


def test_a_hub_error_without_a_message(monkeypatch):
    def fail(*_, **__):
        raise OSError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"the hub did not give it \(OSError\)$"):
        checkpoint_folder("some/model")


def test_resolve_device():
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="'gpu0' is not one torch knows"):
        resolve_device("gpu0")


def test_resolve_device_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="sees no GPU"):
        resolve_device("cuda:1")


@pytest.mark.parametrize(
    ("dtype", "checkpoint", "device", "want"),
    [
        ("auto", torch.bfloat16, "cpu", torch.float32),
        ("auto", torch.float16, "cuda", torch.float16),
        ("auto", "bfloat16", "cuda:1", torch.bfloat16),
        ("auto", None, "cuda", torch.bfloat16),
        ("float16", torch.bfloat16, "cpu", torch.float16),
        (torch.float64, None, "cuda", torch.float64),
    ],
)
def test_resolve_dtype(dtype, checkpoint, device, want):
    assert resolve_dtype(dtype, checkpoint, device) == want


def test_unknown_dtype():
    with pytest.raises(UserError, match=r"dtype 'half' is unknown. Allowed: auto, float32"):
        resolve_dtype("half", None, "cpu")


def ids(tmp_path=None, **flat):
    config = SimpleNamespace(mask_token_id=flat.pop("config_mask", None), eos_token_id=flat.pop("config_eos", None))
    tokenizer = SimpleNamespace(
        mask_token_id=flat.pop("tokenizer_mask", None), eos_token_id=flat.pop("tokenizer_eos", None)
    )
    call = {"vocab_size": 10, "mask_id": None, "stop_ids": None, "family_mask": 9, "family_stop": (8,), **flat}
    return special_ids(config=config, folder=tmp_path, tokenizer=tokenizer, **call)


def test_mask_id_precedence():
    everyone = {"mask_id": 0, "config_mask": 2, "tokenizer_mask": 3}
    for field, want in [("mask_id", 0), ("config_mask", 2), ("tokenizer_mask", 3), (None, 9)]:
        assert ids(**everyone)[0] == want
        everyone.pop(field, None)
    with pytest.raises(UserError, match="give --mask_id"):
        ids(family_mask=None)


def test_stop_id_precedence(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    everyone = {"stop_ids": (1,), "config_eos": 4, "tokenizer_eos": 5}
    assert ids(tmp_path, **everyone)[1] == (1,)
    everyone.pop("stop_ids")
    assert ids(tmp_path, **everyone)[1] == (2, 3)
    assert ids(**everyone)[1] == (4,)
    everyone.pop("config_eos")
    assert ids(**everyone)[1] == (5,)
    assert ids()[1] == (8,)
    assert ids(tmp_path, stop_ids=())[1] == (), "none is a choice too"


def test_the_mask_token_among_a_checkpoints_stop_ids(tmp_path):
    """It ends no text; who lists nothing else has none, and the next one is asked."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    assert ids(tmp_path) == (9, (2,))
    assert ids(tmp_path, mask_id=2) == (2, (9,))
    assert ids(config_eos=9) == (9, (8,))
    assert ids(config_eos=[9], tokenizer_eos=5) == (9, (5,))
    assert ids(tokenizer_eos=9, family_stop=()) == (9, ())
    with pytest.raises(UserError, match="mask_id 9 is also a stop id"):
        ids(tmp_path, stop_ids=(2, 9))


def test_generation_config_without_stop_ids(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    assert ids(tmp_path, config_eos=[4, 5])[1] == (4, 5)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"mask_id": 10}, "mask_id 10 is outside the vocabulary. Allowed: 0 to 9"),
        ({"mask_id": -1}, "mask_id -1 is outside"),
        ({"stop_ids": (3, 12)}, "stopping_criteria_idx 12 is outside"),
        ({"stop_ids": (9,)}, "mask_id 9 is also a stop id"),
    ],
)
def test_ids_that_cannot_be(flat, message):
    with pytest.raises(UserError, match=message):
        ids(**flat)


def test_family_ids_outside_the_vocabulary_do_not_count():
    """A small model of the family does not have the ids of the released ones."""
    assert ids(config_mask=7, family_mask=99, family_stop=(98, 3, 99)) == (7, (3,))
    assert ids(config_mask=7, family_stop=(99,)) == (7, ())
    with pytest.raises(UserError, match="give --mask_id"):
        ids(family_mask=99)
    with pytest.raises(UserError, match="mask_id 99 is outside"):
        ids(config_mask=99, family_mask=7)
    with pytest.raises(UserError, match="stopping_criteria_idx 99 is outside"):
        ids(config_mask=7, tokenizer_eos=99)


def test_a_damaged_generation_config(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config.json: not readable as JSON"):
        ids(tmp_path)


def test_no_model_at_all():
    with pytest.raises(UserError, match="model '' is empty"):
        checkpoint_folder("")


def test_weights_that_are_whole_numbers(folder):
    edit(folder, lambda s: s.update({"model.norm.weight": torch.ones(8, dtype=torch.int64)}))
    refused(folder, "model.norm.weight is of dtype I64. Allowed: F32, BF16, F16, F64")


def test_no_tokenizer(folder):
    with pytest.raises(UserError, match="no usable tokenizer, none of its files is there"):
        load_tokenizer(folder)


def test_a_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("tokenizer_class", ["TokenizersBackend", "PreTrainedTokenizerFast"])
def test_a_tokenizer_saved_by_transformers_5(tmp_path, tokenizer_class):
    shutil.copytree(FAMILIES["SDAR"].tiny, tmp_path / "new")
    config = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": tokenizer_class, "extra_special_tokens": config.pop("additional_special_tokens")}
    (tmp_path / "new" / "special_tokens_map.json").unlink()
    (tmp_path / "new" / "tokenizer_config.json").write_text(json.dumps(config))
    old, new = load_tokenizer(FAMILIES["SDAR"].tiny), load_tokenizer(tmp_path / "new")
    talk = [{"role": "user", "content": "What is 2 + 3?"}]
    assert new.apply_chat_template(talk, tokenize=True) == old.apply_chat_template(talk, tokenize=True)
    assert (new.mask_token_id, new.eos_token_id) == (old.mask_token_id, old.eos_token_id)
    assert new.additional_special_tokens == ["<|im_start|>", "<|im_end|>"]
    assert new.decode(new("<|im_end|>hello").input_ids, skip_special_tokens=True) == "hello"


@pytest.mark.parametrize(
    "fields",
    [{"dtype": "float16"}, {"torch_dtype": "torch.float16"}, {"torch_dtype": "float16", "quantization_config": None}],
    ids=str,
)
def test_the_dtype_of_both_generations(folder, fields):
    config = json.loads((folder / "config.json").read_text())
    del config["torch_dtype"]
    (folder / "config.json").write_text(json.dumps(config | fields))
    _, read = SDARForCausalLM.read_config(folder)
    assert resolve_dtype("auto", read.torch_dtype, "cuda") == torch.float16


def test_a_tokenizer_brings_no_code(folder, monkeypatch):
    (folder / "tokenizer.json").write_text("{}")
    asked, tokenizer = {}, Mock(return_value={"input_ids": [1]})
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda _, **flat: asked.update(flat) or tokenizer
    )
    load_tokenizer(folder)
    assert asked == {"trust_remote_code": False}


@pytest.mark.parametrize("name", ["SDAR/tiny", "Fast-dLLM-v2/tiny", "LLaDA2/tiny", "D2F/llada", "D2F/dream"])
def test_a_plain_tokenizer_is_what_transformers_would_make_of_it(name):
    ours, theirs = load_tokenizer(name), transformers.AutoTokenizer.from_pretrained(checkpoint_folder(name))
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.init_kwargs == theirs.init_kwargs
    assert (ours.special_tokens_map, ours.chat_template) == (theirs.special_tokens_map, theirs.chat_template)


def test_a_tokenizer_that_the_config_alone_names(tmp_path):
    """transformers asks the config, which it does not know of its own."""
    shutil.copytree(FAMILIES["SDAR"].tiny, tmp_path / "new")
    for name, change in [
        ("tokenizer_config.json", {"tokenizer_class": None}),
        ("config.json", {"tokenizer_class": "Qwen2Tokenizer"}),
    ]:
        path = tmp_path / "new" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    found = load_tokenizer(tmp_path / "new")
    assert type(found) is transformers.Qwen2TokenizerFast
    assert found("What is 2 + 3?").input_ids == load_tokenizer("SDAR/tiny")("What is 2 + 3?").input_ids


def test_nothing_is_drawn_where_there_are_no_weights():
    """Sizes and names are those of a network that is built for real; every weight of that has a value."""
    config = tiny().config
    planned, built = on_meta(SDARForCausalLM, config, "here"), SDARForCausalLM(config)
    assert {k: (v.shape, v.dtype) for k, v in planned.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in built.state_dict().items()
    }
    assert all(v.is_meta for v in planned.state_dict().values())
    assert all(v.std() > 0 for k, v in built.state_dict().items() if "norm" not in k)


KEYS = {
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "lm_head": "transformer.ff_out",
    "model.layers.*.self_attn.o_proj": "transformer.blocks.*.attn_out",
    "model.layers.*.mlp.down_proj": "transformer.blocks.*.ff_out",
}


class Renamed(SDARForCausalLM):
    """The network under the names of another make."""

    checkpoint_keys = KEYS


def test_names_of_another_make(tmp_path):
    """Written and read under the checkpoint's names, in and out of shards; a state dict has ours."""
    model = Renamed(tiny().config)
    model.load_state_dict(tiny().state_dict())
    model.save_pretrained(tmp_path / "renamed")
    names = set(load_file(tmp_path / "renamed" / "model.safetensors"))
    assert {"transformer.wte.weight", "transformer.ff_out.weight", "transformer.blocks.1.attn_out.weight"} <= names
    assert {"transformer.blocks.0.ff_out.weight", "model.layers.1.mlp.up_proj.weight"} <= names
    assert not any("o_proj" in name or "down_proj" in name or "lm_head" in name for name in names)
    for _ in range(2):
        again = Renamed.from_pretrained(tmp_path / "renamed")
        assert list(again.state_dict()) == list(tiny().state_dict())
        assert torch.equal(logits(again), logits(tiny()))
        if (tmp_path / "renamed" / "model.safetensors").exists():
            shard(tmp_path / "renamed")


def test_a_tied_head_under_another_name(tmp_path):
    tied = Renamed(tiny(tie_word_embeddings=True).config)
    tied.save_pretrained(tmp_path)
    assert "transformer.ff_out.weight" not in load_file(tmp_path / "model.safetensors")
    edit(tmp_path, lambda s: s.update({"transformer.ff_out.weight": s["transformer.wte.weight"].clone()}))
    loaded = Renamed.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(tied))


def test_errors_have_the_names_of_the_file(tmp_path):
    Renamed(tiny().config).save_pretrained(tmp_path)
    edit(tmp_path, lambda s: s.pop("transformer.blocks.1.attn_out.weight"))
    with pytest.raises(UserError, match=r"lacks transformer\.blocks\.1\.attn_out\.weight"):
        Renamed.from_pretrained(tmp_path)


def test_a_checkpoint_of_other_names_is_cut_over_processes(tmp_path):
    model = Renamed(tiny().config)
    model.save_pretrained(tmp_path)
    parts = [tensor_parallel.shard(Renamed, tmp_path, tensor_parallel.Group(r, 2, torch.device("cpu"))) for r in (0, 1)]
    for module, axis in (("o_proj", 1), ("q_proj", 0)):
        name = f"model.layers.1.self_attn.{module}.weight"
        shares = [{k.replace(".linear.", "."): v for k, v in part.state_dict().items()}[name] for part in parts]
        assert torch.equal(torch.cat(shares, axis), model.state_dict()[name])


def test_special_ids_and_cache_of_a_model():
    """The family's table is the class's; the cache has the model's shape, dtype and device."""
    assert tiny(mask_token_id=7).special_ids() == (7, ())
    with torch.device("meta"):
        released = SDARForCausalLM(SDARConfig(num_hidden_layers=0))
    assert released.special_ids() == (151669, (151645, 151643))
    assert released.special_ids(mask_id=5, stop_ids=(6,)) == (5, (6,))
    cache = tiny(num_key_value_heads=1).double().new_cache(3, 20)
    assert cache.keys.shape == (2, 3, 1, 20, 4)
    assert cache.keys.dtype == torch.float64
