"""The example script as a user meets it, on the checkpoints that ship."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import d2f
from d2f import example_d2f
from d2f.modeling_d2f import BACKENDS
from d2f.options import PRESETS, PROMPTS

TINY = Path(d2f.__file__).parent / "tiny"
SHORT = ["--max_new_tokens", "16", "--block_size", "8", "--device", "cpu"]
ASK = ["--prompt", "Count from 128 to 140 in steps of 4."]


def run(*argv: str) -> None:
    example_d2f.main([*SHORT, *argv])


def refused(capsys, *argv: str) -> str:
    """The one line that a command ends with, and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        example_d2f.main([*argv, "--device", "cpu"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert stop.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def copied(tmp_path) -> Path:
    """The shipped LLaDA checkpoint somewhere else, with its adapter inside."""
    return Path(shutil.copytree(TINY / "llada", tmp_path / "mine"))


@pytest.mark.parametrize("model", list(BACKENDS))
@pytest.mark.parametrize(("name", "title"), [("d2f", "blocks in flight"), ("ssd", "S2D2")])
def test_every_decoder_on_every_backend(capsys, model, name, title):
    run("--model", model, f"--generate_fn={name}", *ASK)
    out = capsys.readouterr().out
    assert f"D2F, {title} | {model} with its adapter | cpu, float32\npreset tiny: " in out
    assert f"lossless: {'yes' if name == 'ssd' else 'no'}" in out


def test_the_default_is_d2f_on_llada(capsys):
    run(*ASK)
    assert "D2F, blocks in flight | llada with its adapter" in capsys.readouterr().out


def test_without_a_prompt_decoders_are_compared(capsys):
    for name, rivals in (("d2f", ["one block at a time"]), ("ssd", ["plain D2F"])):
        run("--generate_fn", name)
        out = capsys.readouterr().out
        for row in ("this run", *rivals, "block size one (AR)"):
            assert row in out


@pytest.mark.parametrize(
    "argv",
    [
        "--model dream --generate_fn ssd --allow_resample false --ssd_threshold_draft_confidence true --draft_confidence_threshold 0.5",
        "--model llada --generate_fn ssd --forward_stats true --truncate_at_eos false --no_chat false --batch_size 1",
        "--model llada --dtype float32 --seed 42 --temperature 0.0 --top_p None --top_k None",
        "--generate_fn ssd --target_block_size 1 --min_ssd_span_length 1 --min_tokens_per_step 1 --ssd_partial_ar_span 0 --acceptance published",
        "--block_add_threshold 0.5 --decoded_token_threshold 0.8 --skip_threshold 0.9 --max_length 4096",
    ],
)
def test_flags_of_the_published_script(capsys, argv):
    run(*argv.split(), *ASK)
    assert "this run" in capsys.readouterr().out


def test_prompts_in_angle_brackets(capsys, tmp_path):
    outputs = []
    for prompt in ("<dog>", PROMPTS["<dog>"]):
        folder = tmp_path / str(len(outputs))
        run("--prompt", prompt, "--output_dir", str(folder))
        outputs.append(json.loads((folder / "outputs.jsonl").read_text()))
    assert outputs[0]["prompt"] == PROMPTS["<dog>"]
    assert outputs[0]["token_ids"] == outputs[1]["token_ids"]
    assert len(set(PROMPTS.values())) == len(PROMPTS) == 5


def test_forward_stats_are_those_of_the_published_script(capsys):
    """What they count is checked against recorded decodes in `test_decode_golden`; here: they are printed, and agree with the line above them."""
    run("--forward_stats", "true", *ASK)
    out = capsys.readouterr().out
    keys = [line.split()[1].rstrip(":") for line in out.splitlines() if line.startswith("[stats] ")]
    assert keys == ["total_forwards", "avg_forwards_per_block", "blockwise_avg_forwards", "per_block_forwards", "avg_active_blocks_per_forward",
                    "avg_active_blocks_per_step", "avg_forwarded_blocks_per_forward"]  # fmt: skip
    total = int(out.split("[stats] total_forwards: ")[1].split()[0])
    assert total == int(out.split("\nforwards: ")[1].split()[0]) > 1
    assert "step    0 |" in out


def test_stream_prints_what_batch_prints(capsys):
    run(*ASK)
    text = capsys.readouterr().out.split("=== text 0\n")[1].split("\n\ndecoder")[0].strip()
    run(*ASK, "--stream")
    assert text
    assert text in capsys.readouterr().out


def test_a_run_that_was_cut_short_resumes(capsys, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {k} + 3?"}) + "\n" for k in range(4)))
    argv = ["--prompt_file", str(prompts), "--batch_size", "2", "--output_dir"]

    def read(name: str) -> dict:
        lines = (tmp_path / name / "outputs.jsonl").read_text().splitlines()
        return {r["index"]: r["token_ids"] for r in map(json.loads, lines)}

    for folder in ("whole", "cut"):
        run(*argv, str(tmp_path / folder))
    file = tmp_path / "cut/outputs.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]) + lines[2][:30])
    capsys.readouterr()
    run(*argv, str(tmp_path / "cut"))
    assert "2 of 4 texts are in" in capsys.readouterr().out
    assert read("cut") == read("whole")
    assert len(read("cut")) == 4


def test_pretrained_and_adapter(capsys, copied):
    """A base elsewhere, with the adapter inside it, decodes as the shipped pair does; alone it decodes otherwise and says so."""
    texts = []
    for argv in (["--preset", "tiny"], ["--preset", "tiny", "--pretrained", str(copied), "--adapter", str(copied / "adapter")],
                 ["--preset", "tiny", "--pretrained", str(copied)]):  # fmt: skip
        run("--model", "llada", *argv, *ASK)
        shown = capsys.readouterr()
        texts.append(shown.out.split("=== text 0\n")[1].split("\n\ndecoder")[0])
        assert ("no --adapter" in shown.err) == ("--pretrained" in argv and "--adapter" not in argv)
    assert texts[0] == texts[1]


def test_the_wrong_base_is_refused(capsys, copied):
    argv = ["--model", "llada", "--pretrained", str(copied), "--adapter", str(TINY / "llada" / "adapter")]
    line = refused(capsys, *SHORT, *argv, *ASK)
    assert "was trained on '..', not on" in line
    assert line.endswith("--force_adapter")
    run(*argv, "--force_adapter", *ASK)
    assert "with its adapter" in capsys.readouterr().out


def test_an_adapter_beside_its_base_by_relative_paths(copied, tmp_path):
    """The paths are read from where the command runs, the adapter's own from where it lies."""
    shutil.move(copied / "adapter", tmp_path / "lora")
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "../mine"}))
    command = [sys.executable, example_d2f.__file__, *SHORT, "--pretrained", "mine", "--adapter", "lora", *ASK]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot be told" not in done.stderr
    assert "mine with its adapter" in done.stdout


def test_an_unknown_base_warns_once(copied, recwarn):
    config = copied / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "SOME/Base"}))
    run("--pretrained", str(copied), "--adapter", str(copied / "adapter"), *ASK)
    told = [w for w in recwarn if "cannot be told" in str(w.message)]
    assert len(told) == 1
    assert "SOME/Base" in str(told[0].message)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--generate_fn", "ssd_old"], "unknown generate_fn 'ssd_old'; did you mean ssd? Allowed: d2f, ssd"),
        (["--model", "lada"], "model 'lada': no such folder"),
        (["--model", "llada", "--pretrained", str(TINY / "dream")], "is of model_type 'Dream'. Allowed with model llada: llada"),
        (["--model", "D2F/llada", "--pretrained", "x"], "Allowed with pretrained: llada, dream"),
        (["--adapter", "nowhere/at/all"], "no such folder"),
        (["--block_ad_threshold", "0.5"], "did you mean block_add_threshold"),
        (["--block_add_threshold", "1.5"], "block_add_threshold is 1.5. Allowed: "),
        (["--cache_ver"], "'cache_ver' is not one of d2f. Allowed with --generate_fn ssd"),
        (["--generate_fn", "ssd", "--acceptance", "exact", "--min_tokens_per_step", "2"], "min_tokens_per_step is 2. Allowed with acceptance exact: 1"),
        (["--attention", "full", *ASK], "attention is 'full'. Allowed with this network: block"),
        (["--tensor_parallel", "2"], "tensor_parallel 2 does not divide"),
        (["--prompt", ""], "empty"),
    ],
    ids=lambda a: " ".join(a)[:40] if isinstance(a, list) else None,
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(capsys, argv, message):
    assert message in refused(capsys, *argv)


def test_presets_of_the_demo_are_there():
    assert PRESETS["tiny"]["acceptance"] == "exact"
