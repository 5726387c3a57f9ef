"""The example script as a user meets it, on a small checkpoint of random weights with the tokenizer that ships."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import sdar
from llada2 import LLaDA2MoeConfig, LLaDA2MoeModelLM, example_llada
from llada2.generate_utils import generate_cached, generate_nocache
from shared.network.loading import load_tokenizer

SHORT = ["--max_new_tokens", "12", "--block_size", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder, donor = tmp_path_factory.mktemp("llada2"), Path(sdar.__file__).parent / "tiny"
    tokenizer = load_tokenizer(donor)
    sizes = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1, "moe_intermediate_size": 8,
        "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "use_bias": False, "initializer_range": 0.3,
    }  # fmt: skip
    ids = {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LLaDA2MoeModelLM(LLaDA2MoeConfig(vocab_size=len(tokenizer), **sizes, **ids)).save_pretrained(folder)
    for file in donor.glob("*token*"):
        shutil.copy(file, folder)
    return str(folder)


def run(checkpoint: str, *argv: str) -> None:
    example_llada.main([*SHORT, "--model", checkpoint, *argv])


@pytest.mark.parametrize(
    ("name", "title"), [("nocache", "no cache"), ("cached", "threshold and editing"), ("ssd_policy", "S2D2")]
)
def test_every_decoder_runs(checkpoint, capsys, name, title):
    run(checkpoint, f"--generate_fn={name}", "--prompt", "What is 2 + 2?")
    out = capsys.readouterr().out
    assert f"LLaDA2, {title} |" in out
    assert "this run" in out
    assert "lossless: no" in out


def test_the_default_is_cached(checkpoint, capsys):
    run(checkpoint, "--prompt", "What is 2 + 2?")
    assert "LLaDA2, threshold and editing |" in capsys.readouterr().out


def test_without_a_prompt_decoders_are_compared(checkpoint, capsys):
    run(checkpoint, "--generate_fn", "ssd_policy")
    out = capsys.readouterr().out
    for name in ("this run", "plain diffusion", "block size one (AR)"):
        assert name in out
    for name in ("cached", "nocache"):
        run(checkpoint, "--generate_fn", name)
        assert "without editing" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "decode"), [("cached", generate_cached), ("nocache", generate_nocache)])
def test_the_rival_without_editing_differs_in_nothing_else(name, decode):
    """The same decoder, and no forwards that only editing would need."""
    script = example_llada.SCRIPTS[name]
    options = script.options.from_flat({"editing_threshold": 0.3, "max_post_steps": 4, "block_length": 8})
    rival, settings = script.rivals(options)["without editing"]
    assert rival is decode
    assert settings == options.replace(editing_threshold=1.0, max_post_steps=0)


def test_flags_of_the_published_script(checkpoint, capsys):
    """Its command lines paste: ``-p``, ``--device_map``, values of booleans, spellings of thresholds and lengths."""
    argv = (
        "--generate_fn ssd_policy --dtype float32 --device_map=cpu --seed 42 --threshold 0.95 --editing_threshold 0.0 "
    )
    argv += "--gen_length 8 --block_length 8 --max_post_steps 2 --num_to_transfer 1 --eos_early_stop true --temperature 0.0 "
    argv += "--do_verify_policy score_hysteresis --hysteresis_threshold_on 0 --hysteresis_threshold_off -5 "
    argv += "--do_verify_score_type difference_static --score_penalty_coef 4 --token_acceptance_estimator soft_entropy_negexp "
    argv += "--record_decoding_order=yes --top_k none --top_p None"
    example_llada.main(["--model", checkpoint, "-p", "What is 2 + 2?", *argv.split()])
    out = capsys.readouterr().out
    assert "step    0 |" in out
    assert "edits " in out


def test_stream_prints_what_batch_prints(checkpoint, capsys):
    run(checkpoint, "--prompt", "What is 2 + 2?")
    text = capsys.readouterr().out.split("=== text 0\n")[1].split("\n\ndecoder")[0].strip()
    run(checkpoint, "--prompt", "What is 2 + 2?", "--stream")
    assert text
    assert text in capsys.readouterr().out


def test_stop_strings_end_a_text(checkpoint):
    """At the block in which they appear; the text is cut before them, edits and post steps or not."""
    model, tokenizer = LLaDA2MoeModelLM.from_pretrained(checkpoint), load_tokenizer(checkpoint)
    flat = {"block_length": 4, "max_new_tokens": 24, "max_post_steps": 1, "tokenizer": tokenizer}
    (whole,) = generate_cached(model, [[5, 6, 7]], **flat).completions
    word = tokenizer.decode(whole.tokens[9:10])
    (cut,) = generate_cached(model, [[5, 6, 7]], stop=[word], **flat).completions
    assert word
    assert cut.text == whole.text[: whole.text.index(word)]
    assert cut.trace.total_forwards < whole.trace.total_forwards


def test_forward_stats_print_every_edit(checkpoint, capsys, tmp_path):
    """Under its step, with the pieces of text that were replaced and put there."""
    path, tokenizer = tmp_path / "trace.json", load_tokenizer(checkpoint)
    edited = ["--editing_threshold", "0", "--max_post_steps", "1", "--trace", str(path)]
    run(checkpoint, "-p", "What is 2 + 2?", *edited, "--forward_stats")
    printed, (trace,) = capsys.readouterr().out, json.loads(path.read_text())
    steps = printed.split("\nstep ")[1:]
    assert len(steps) == len(trace["verified_span"])
    for step, position, old, new in trace["edits"]:
        piece = f"{position}: {tokenizer.decode([old])!r} -> {tokenizer.decode([new])!r}"
        assert piece in steps[step].split("edits ")[1]


def test_trace_file_has_the_edits(checkpoint, capsys, tmp_path):
    path = tmp_path / "trace.json"
    run(checkpoint, "-p", "What is 2 + 2?", "--editing_threshold", "0", "--max_post_steps", "1", "--trace", str(path))
    (trace,) = json.loads(path.read_text())
    assert trace["edits"]
    assert all(len(edit) == 4 for edit in trace["edits"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--generate_fn", "ssd"], "unknown generate_fn 'ssd'. Allowed: nocache, cached, ssd_policy"),
        (["--editing_treshold", "0.5"], "did you mean editing_threshold"),
        (
            ["--generate_fn", "nocache", "--fuse_commit", "true"],
            "'fuse_commit' is not one of nocache. Allowed with --generate_fn cached or --generate_fn ssd_policy",
        ),
        (["--cache_ver"], "'cache_ver' is not one of cached. Allowed with --generate_fn ssd_policy"),
        (["--max_post_steps", "-1"], "max_post_steps is -1. Allowed: at least 0"),
        (["--prompt", ""], "empty"),
    ],
    ids=lambda a: " ".join(a)[:40] if isinstance(a, list) else None,
)
def test_bad_input_is_one_line_and_exit_code_2(checkpoint, capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        run(checkpoint, *argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert stop.value.code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
