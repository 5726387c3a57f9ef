"""The example scripts as a user meets them: on the shipped checkpoint, and with bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import sdar
from sdar import generate, generate_ssd_policy
from shared.scripts.identity import fingerprint

TINY = Path(sdar.__file__).parent / "tiny"
FAST = ["--max_new_tokens", "24", "--device", "cpu"]


def run(argv: list[str], script=generate_ssd_policy.SCRIPT) -> None:
    script.main([*FAST, *argv])


def refused(capsys, argv: list[str], script=generate_ssd_policy.SCRIPT) -> str:
    """The one line a bad command prints. Exit code 2, nothing on standard output."""
    with pytest.raises(SystemExit) as stop:
        script.main(argv)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.strip()]
    assert stop.value.code == 2
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert "forwards" not in out
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", ""], "empty"),
        (["--prompt", "   "], "empty"),
        (["--prompt", "one two " * 3000], "Allowed: "),
        (["--block_lenght", "4"], "did you mean block_length"),
        (["--do_verify_policy", "score_treshold"], "did you mean score_threshold"),
        (
            ["--do_verify_policy", "score_hysteresis", "--hysteresis_threshold_on", "-2"],
            "above hysteresis_threshold_off",
        ),
        (["--block_length", "0"], "block_length is 0. Allowed: at least 1"),
        (["--denoising_steps", "0"], "denoising_steps is 0. Allowed: at least 1"),
        (["--confidence_threshold", "7"], "confidence_threshold is 7.0. Allowed: at least 0.0 and at most 1.0"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--temperature", "hot"], "temperature is 'hot'"),
        (["--model", "/no/such/checkpoint"], "no such folder"),
        (["--mask_id", "99999999"], "outside the vocabulary"),
        (["--stopping_criteria_idx", "-5"], "outside the vocabulary"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--dtype", "int3"], "dtype 'int3'"),
        (["--preset", "paper"], "did you mean paper-"),
        (["--prompt", "a", "--prompt_file", "b"], "one of them"),
        (["--block_length"], "expected"),
        (["--acceptance", "exact", "--no_resample"], "allow_resample is False"),
        (["--temperature", "1", "--verify_temperature", "0.5"], "verify_temperature"),
    ],
    ids=lambda a: " ".join(a)[:40] if isinstance(a, list) else None,
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, argv, message):
    assert message in refused(capsys, argv)


def test_plain_decoding_has_no_speculation_flags(capsys):
    assert "unknown flag 'cache_ver'" in refused(capsys, ["--cache_ver"], generate.SCRIPT)


def test_broken_prompt_file(capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "What is 2 + 2?"}\n{"prompt": \n')
    assert "line 2: broken JSON" in refused(capsys, ["--prompt_file", str(path)])


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def test_missing_tensor(capsys, copy):
    state = load_file(copy / "model.safetensors")
    del state["model.layers.1.self_attn.k_norm.weight"]
    save_file(state, copy / "model.safetensors")
    assert "lacks model.layers.1.self_attn.k_norm.weight" in refused(capsys, ["--model", str(copy)])


def test_other_weight_formats_are_not_loaded(capsys, copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "no model.safetensors" in refused(capsys, ["--model", str(copy)])


def test_a_run_that_was_cut_short_resumes(capsys, tmp_path):
    """Results of finished texts survive; a second run decodes the rest and gives what one run would have given."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {k} + 3?", "id": k}) + "\n" for k in range(4)))
    argv = ["--prompt_file", str(prompts), "--batch_size", "2", "--acceptance", "published", "--output_dir"]
    run([*argv, str(tmp_path / "whole")])
    whole = {r["index"]: r for r in map(json.loads, (tmp_path / "whole/outputs.jsonl").read_text().splitlines())}
    assert sorted(whole) == [0, 1, 2, 3]
    assert whole[3]["id"] == 3
    run([*argv, str(tmp_path / "cut")])
    lines = (tmp_path / "cut/outputs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut/outputs.jsonl").write_text("".join(lines[:2]) + lines[2][:30])
    capsys.readouterr()
    run([*argv, str(tmp_path / "cut")])
    assert "2 of 4 texts are in" in capsys.readouterr().out
    again = {r["index"]: r for r in map(json.loads, (tmp_path / "cut/outputs.jsonl").read_text().splitlines())}
    assert {k: r["token_ids"] for k, r in again.items()} == {k: r["token_ids"] for k, r in whole.items()}
    assert "other settings" in refused(capsys, [*FAST, *argv, str(tmp_path / "cut"), "--seed", "1"])


@pytest.mark.parametrize(
    "name",
    ["generation_config.json", "config.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"],
)
def test_a_resume_notices_any_file_that_can_change_a_text(capsys, copy, tmp_path, name):
    argv = ["--prompt", "What is 2 + 2?", "--model", str(copy), "--output_dir", str(tmp_path / "out")]
    run(argv)
    fingerprint.cache_clear()
    run(argv)
    assert "1 of 1 texts are in" in capsys.readouterr().out
    kept = (tmp_path / "out/outputs.jsonl").read_bytes()
    if name == "model.safetensors":
        os.utime(copy / name, ns=(1, 1))
    else:
        template = b"{% for m in messages %}{{ m.content }}{% endfor %}"
        (copy / name).write_bytes((copy / name).read_bytes() + b" " if (copy / name).exists() else template)
    fingerprint.cache_clear()
    assert f"other settings: file {name} is [" in refused(capsys, [*FAST, *argv])
    assert (tmp_path / "out/outputs.jsonl").read_bytes() == kept


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--block_length", "4"], "options block_length is 4, there it was "),
        (["--no_chat"], "prompt 0 is '"),
        (["--seed", "1"], "seed is 1, there it was 42"),
    ],
)
def test_a_resume_names_what_differs(capsys, copy, tmp_path, change, said):
    argv = ["--prompt", "What is 2 + 2?", "--model", str(copy), "--output_dir", str(tmp_path / "out")]
    run(argv)
    capsys.readouterr()
    assert f"other settings: {said}" in refused(capsys, [*FAST, *argv, *change])


def test_a_resume_notices_other_code(capsys, copy, tmp_path, monkeypatch):
    argv = ["--prompt", "What is 2 + 2?", "--model", str(copy), "--output_dir", str(tmp_path / "out")]
    run(argv)
    capsys.readouterr()
    monkeypatch.setattr("shared.scripts.cli.code_version", lambda folder: "another")
    assert "other settings: code version is 'another', there it was '" in refused(capsys, [*FAST, *argv])


def test_two_runs_do_not_write_to_one_folder(capsys, tmp_path):
    """A second run is told at once; what a killed run held is free."""
    holder = "import sys; from shared.scripts.claims import claim; claim(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    call = [sys.executable, "-c", holder, str(tmp_path / "out")]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        argv = ["--prompt", "What is 2 + 2?", "--output_dir", str(tmp_path / "out")]
        assert "is in use by another run. Allowed: another folder" in refused(capsys, [*FAST, *argv])
        other.kill()
    run(argv)
    run(argv)
    assert len((tmp_path / "out/outputs.jsonl").read_text().splitlines()) == 1


def test_stream_prints_what_batch_prints(capsys):
    run(["--prompt", "What is 2 + 2?"])
    text = capsys.readouterr().out.split("=== text 0\n")[1].split("\n\ndecoder")[0].strip()
    run(["--prompt", "What is 2 + 2?", "--stream"])
    streamed = capsys.readouterr().out
    assert text
    assert text in streamed


def test_forward_stats_and_trace_file(capsys, tmp_path):
    run(
        [
            "--prompt",
            "What is 2 + 2?",
            "--forward_stats",
            "--draft_ver",
            "--cache_ver",
            "--trace",
            str(tmp_path / "t.json"),
        ]
    )
    out = capsys.readouterr().out
    (trace,) = json.loads((tmp_path / "t.json").read_text())
    assert "step    0 |" in out
    assert f"forwards: {sum(trace['forwards'].values())} " in out
    assert len(trace["step_of"]) == len(trace["token_ids"])


def test_prompt_length_truncates(capsys):
    run(["--prompt", "one two " * 3000, "--prompt_length", "32"])
    assert "this run" in capsys.readouterr().out


def test_demo_compares_three_decoders(capsys):
    run([])
    out = capsys.readouterr().out
    for name in ("this run", "plain diffusion", "block size one (AR)", "lossless: "):
        assert name in out


def test_two_processes_give_what_one_gives(capsys, tmp_path):
    """``torchrun`` data parallel: same texts, every prompt once, one report."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {k} + 3?"}) + "\n" for k in range(5)))
    argv = [*FAST, "--prompt_file", str(prompts), "--batch_size", "2", "--acceptance", "published", "--output_dir"]
    generate_ssd_policy.SCRIPT.main([*argv, str(tmp_path / "one")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = [
        str(Path(sdar.__file__).parent / "generate_ssd_policy.py"),
        *argv,
        str(tmp_path / "two"),
        "--trace",
        str(tmp_path / "trace.json"),
    ]
    two = subprocess.run(
        [*torchrun, *script], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("this run") == 1
    ids = [
        {r["index"]: r["token_ids"] for f in (tmp_path / d).glob("outputs*.jsonl") for r in map(json.loads, f.open())}
        for d in ("one", "two")
    ]
    assert sorted(ids[1]) == [0, 1, 2, 3, 4]
    assert ids[0] == ids[1]
    assert (tmp_path / "two/outputs.rank1.jsonl").is_file()
    assert len(json.loads((tmp_path / "trace.json").read_text())) == 5


@pytest.mark.parametrize("model", [[], ["--model", "tiny"], ["--model", "SDAR/tiny"], ["--model", str(TINY)]])
def test_the_shipped_checkpoint_has_its_preset_by_any_name(model, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run([*model, "--prompt", "Count from 2 to 8 in steps of 2.", "--compare", "false"])
    header, preset, *_ = capsys.readouterr().out.splitlines()
    assert header == "SDAR, S2D2 | tiny | cpu, float32"
    assert preset.startswith("preset tiny: block_length=32")


def test_another_checkpoint_has_no_preset(capsys, tmp_path):
    shutil.copytree(TINY, tmp_path / "mine")
    run(["--model", str(tmp_path / "mine"), "--prompt", "Count from 2 to 8 in steps of 2.", "--compare", "false"])
    header, preset, *_ = capsys.readouterr().out.splitlines()
    assert f"| {tmp_path / 'mine'} |" in header
    assert preset == "no preset"
