from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sdar import SDARConfig, SDARForCausalLM, generate_ssd_policy
from shared.errors import UserError
from shared.network.loading import load_tokenizer
from shared.options import ALIASES, Acceptance, Blocks, Cache, FlatOptions, Routing, Sampling, Unmask
from shared.output import Completion, Lossless, Output
from shared.scripts.cli import (
    SCRIPT_ALIASES,
    Script,
    ScriptArguments,
    Streamer,
    build_parser,
    choose_script,
    fit_prompts,
    format_comparison,
    load_prompts,
    parse,
    result_of,
)
from shared.scripts.prompts import spell_out
from shared.trace import Spent, Trace


@dataclass(frozen=True, slots=True)
class Options(FlatOptions):
    sampling: Sampling = field(default_factory=Sampling)
    blocks: Blocks = field(default_factory=Blocks)
    unmask: Unmask = field(default_factory=Unmask)
    routing: Routing = field(default_factory=Routing)
    acceptance: Acceptance = field(default_factory=Acceptance)
    cache: Cache = field(default_factory=Cache)


PRESETS = {"small": {"block_length": 16, "max_new_tokens": 32}, "paper": {"block_length": 4, "cache_ver": True}}


def parsed(*argv: str, presets=PRESETS):
    return parse(Options, presets, ["--model", "here", *argv], "about", "small")


def option(name: str, *argv: str):
    _, options, _ = parsed(*argv)
    return getattr(getattr(options, Options.names()[name][0]), name)


def test_every_field_is_a_flag():
    flags = {s for a in build_parser(Options, "about")._actions for s in a.option_strings}
    names = [*Options.names(), *(f.name for f in dataclasses.fields(ScriptArguments))]
    assert {f"--{n}" for n in names} <= flags
    assert {
        f"--{s}" for n, row in {**ALIASES, **SCRIPT_ALIASES}.items() if n in names for s in row if len(s) > 1
    } <= flags
    assert "-p" in flags


def test_help_tells_choices_and_defaults(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    text = capsys.readouterr().out
    assert "about" in text
    assert "{published, exact} (default: published)" in " ".join(text.split())
    for name in Options.names():
        assert f"--{name}" in text


def test_nothing_given():
    script, options, preset = parsed()
    assert script == ScriptArguments(model="here")
    assert options == Options()
    assert preset is None


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ([], False),
        (["--cache_ver"], True),
        (["--cache_ver", "true"], True),
        (["--cache_ver=true"], True),
        (["--cache_ver", "false"], False),
        (["--cache_ver", "--draft_ver"], True),
        (["--cache_ver", "true", "--cache_ver", "false"], False),
    ],
)
def test_booleans_bare_and_valued(argv, value):
    assert option("cache_ver", *argv) is value


def test_no_resample():
    assert option("allow_resample") is True
    assert option("allow_resample", "--no_resample") is False
    assert option("allow_resample", "--allow_resample", "false") is False


@pytest.mark.parametrize("flag", ["gen_length", "max_gen_toks", "max_new_tokens"])
def test_spellings_of_the_length(flag):
    assert option("max_new_tokens", f"--{flag}", "9") == 9


def test_other_spellings():
    assert option("block_length", "--block_size", "6") == 6
    assert option("confidence_threshold", "--threshold", "0.5") == 0.5
    script, _, _ = parse(Options, PRESETS, ["--model_dir", "there", "--return_forward_stats"], "", "small")
    assert (script.model, script.forward_stats) == ("there", True)


@pytest.mark.parametrize(
    ("name", "argv", "value"),
    [
        ("ssd_ratio_threshold", ["--ssd_ratio_threshold", "-1.0"], -1.0),
        ("stopping_criteria_idx", ["--stopping_criteria_idx", "1", "2"], (1, 2)),
        ("stopping_criteria_idx", ["--stopping_criteria_idx", "5"], (5,)),
        ("stopping_criteria_idx", ["--stopping_criteria_idx", "1,2"], (1, 2)),
        ("stopping_criteria_idx", ["--stopping_criteria_idx", "none"], ()),
        ("stopping_criteria_idx", ["--stopping_criteria_idx", "-5", "3"], (-5, 3)),
        ("score_penalty_coef", ["--score_penalty_coef", "-1e-3"], -1e-3),
        ("score_penalty_coef", ["--score_penalty_coef", "-.5E+1"], -5.0),
        ("score_penalty_coef", ["--score_penalty_coef=-2"], -2.0),
        ("temperature", ["--do_sample"], 1.0),
        ("temperature", ["--do_sample", "--temperature", "0.5"], 0.5),
        ("temperature", ["--do_sample", "false", "--temperature", "0.5"], 0.0),
        ("do_verify_policy", ["--do_verify_policy", "always"], "always"),
        ("block_length", ["--block_length", "none"], None),
    ],
)
def test_values(name, argv, value):
    assert option(name, *argv) == value


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cache_verr"], "unknown flag 'cache_verr'; did you mean cache_ver"),
        (["--cache"], "unknown flag 'cache'"),
        (["--block_len", "4"], "unknown flag 'block_len'; did you mean block_length"),
        (["--blok_length=4"], "unknown flag 'blok_length'; did you mean block_length"),
        (["stray"], "'stray' belongs to no flag. Allowed: --prompt"),
        (["--model", ""], "model '' is empty"),
        (["--output_dir", "/proc/out"], "output folder '/proc/out' cannot be written"),
        (["--trace", "/"], "trace '/' is a folder. Allowed: a file"),
        (["--top_k"], "expected one argument"),
        (["--top_k", "many"], "top_k is 'many'. Allowed: int"),
        (["--top_p", "2"], "top_p is 2.0. Allowed: above 0.0 and at most 1.0"),
        (["--do_verify_policy", "alway"], "unknown do_verify_policy 'alway'; did you mean always"),
        (["--batch_size", "0"], "batch_size is 0. Allowed: at least 1"),
        (["--seed", str(2**64)], f"seed is {2**64}. Allowed: at least 0 and at most {2**63 - 1}"),
        (["--stopping_criteria_idx", "1.7"], "stopping_criteria_idx is .*Allowed: a list of token ids"),
        (["--score_penalty_coef", "--stream"], "expected one argument"),
        (["--do_smaple"], "unknown flag 'do_smaple'; did you mean do_sample"),
        (["--preset", "papper"], "unknown preset 'papper'; did you mean paper"),
        (["--prompt", "a", "--prompt_file", "b"], "prompt and prompt_file are both given"),
    ],
)
def test_bad_command_lines(argv, message):
    with pytest.raises(UserError, match=message):
        parsed(*argv)


def test_presets_with_flags_on_top():
    _, options, preset = parsed("--preset", "paper", "--block_size", "8")
    assert preset == "paper"
    assert (options.blocks.block_length, options.cache.cache_ver) == (8, True)


def test_flags_override_other_spellings_of_a_preset():
    presets = {"small": {"gen_length": 9, "do_sample": True, "threshold": 0.5}}
    settings = lambda *argv: parse(Options, presets, argv, "", "small")[1]  # noqa: E731
    assert settings().blocks.max_new_tokens == 9
    for flag in ("--max_new_tokens", "--max_gen_toks", "--gen_length"):
        assert settings(flag, "16").blocks.max_new_tokens == 16
    assert settings("--confidence_threshold", "0.25").unmask.confidence_threshold == 0.25
    assert settings().sampling.temperature == 1
    assert settings("--temperature", "0.5").sampling.temperature == 0.5
    assert settings("--do_sample", "false").sampling.temperature == 0
    assert parsed("--do_sample", presets={"small": {"temperature": 0.0}})[1].sampling.temperature == 1


def test_texts_that_read_none():
    script, _, _ = parsed("--prompt", "None", "--batch_size", "2", "--prompt_length", "none")
    assert (script.prompt, script.prompt_length) == ("None", None)


def test_a_big_seed_is_kept_whole():
    assert parsed("--seed", str(2**53 + 1))[0].seed == 2**53 + 1


def test_the_shipped_preset_needs_no_model():
    assert parse(Options, PRESETS, [], "", "small")[1].blocks.block_length == 16
    assert parse(Options, PRESETS, ["--gen_length", "8"], "", "small")[1].blocks.max_new_tokens == 8
    assert parse(Options, PRESETS, ["--preset", "paper"], "", "small")[2] == "paper"
    assert parsed()[2] is None, "a model of one's own has the plain defaults"


class Characters:
    chat_template = "yes"

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, messages, **_):
        return ">" + messages[0]["content"]


def test_prompts_of_a_script(tmp_path):
    demo, mine = tmp_path / "demo.jsonl", tmp_path / "mine.txt"
    load = lambda **flat: load_prompts(ScriptArguments(**flat), Characters(), demo, "default")  # noqa: E731
    assert load() == ([{"prompt": "default"}], [[ord(c) for c in ">default"]])
    demo.write_text('{"prompt": "d", "answer": 1}\n')
    mine.write_text("one\ntwo\n")
    assert load()[0] == [{"prompt": "d", "answer": 1}]
    assert load(prompt="p", no_chat=True)[1] == [[ord("p")]]
    assert load(prompt_file=str(mine))[1] == [[ord(c) for c in ">one"], [ord(c) for c in ">two"]]
    with pytest.raises(UserError, match="prompt: the prompt is empty"):
        load(prompt=" ")


def test_a_long_prompt_keeps_its_end():
    fit = lambda ids, **flat: fit_prompts(ScriptArguments(**flat), None, ids, 99)  # noqa: E731
    assert fit([[1, 2, 3], [4]], prompt_length=2) == [[2, 3], [4]]
    assert fit([[1, 2, 3], [4]]) == [[1, 2, 3], [4]]
    assert "the last ones" in " ".join(build_parser(Options, "").format_help().split())


def test_a_mask_token_written_out_in_a_prompt_is_words(capsys, tmp_path):
    """Of one prompt and of several, with and without a limit on the length."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("In BERT the token <|MASK|> is hidden. What?\nWhat is 2 + 3?\n")
    argv = ["--max_new_tokens", "8", "--prompt_length", "40", "--output_dir", str(tmp_path / "out")]
    generate_ssd_policy.SCRIPT.main([*argv, "--prompt_file", str(prompts)])
    assert len((tmp_path / "out" / "outputs.jsonl").read_text().splitlines()) == 2
    tokenizer = load_tokenizer("SDAR/tiny")
    text = "a <|MASK|> b"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spelled = spell_out(tokenizer, ids, 1023)
    assert 1023 in ids
    assert 1023 not in spelled
    assert tokenizer.decode(spelled) == text
    assert spell_out(tokenizer, ids, 5) == ids


def completion(request: int, tokens: list[int] | None = None) -> Completion:
    trace = Trace(1, 1, [1, 2], [-1, 0], [1, 2], [0, 0], [0.0, 1.0], 1, [], {"model": {"draft": Spent(1, 1)}})
    return Completion(request, tokens or [2], trace, 0.25, 0, f"text {request} ä\n")


def test_what_is_kept_of_a_text():
    kept = result_of(1, {"prompt": "b", "index": 41, "text": "mine", "answer": 4}, completion(1))
    assert (kept["index"], kept["prompt"], kept["answer"], kept["text"]) == (1, "b", 4, "text 1 ä\n")
    assert (kept["token_ids"], kept["forwards"], kept["decided"]) == ([2], {"draft": 1}, {"unmasked": 1})
    assert next(iter(kept)) == "index"


class Bytes:
    """One id a byte, as byte-level tokenizers have for what is not in their vocabulary; 0 is a special token."""

    def decode(self, ids, skip_special_tokens=False):
        return bytes(i for i in ids if i or not skip_special_tokens).decode("utf-8", errors="replace")


def test_streamer_holds_back_half_a_character(capsys):
    ids = list("aä€b".encode())  # ä is two bytes, € three
    for cut in range(1, len(ids)):
        stream = Streamer(Bytes(), [], many=False)
        stream(0, ids[:cut])
        before = capsys.readouterr().out
        assert "\ufffd" not in before
        assert "aä€b".startswith(before)
        stream(0, ids[cut:])
        assert before + capsys.readouterr().out == "aä€b"


def test_streamer_ends_at_the_first_stop_token(capsys):
    stream = Streamer(Bytes(), [ord("."), 0], many=False)
    for block in ("ab", "c.d", "ef"):
        stream(0, list(block.encode()))
    assert capsys.readouterr().out == "abc"


def test_streamer_names_texts_when_there_are_many(capsys):
    stream = Streamer(Bytes(), [], many=True)
    stream(0, [97])
    stream(3, [98, 99])
    stream(0, [100])
    assert capsys.readouterr().out == "[0] a\n[3] bc\n[0] d\n"


def test_streamer_prints_a_question_once_before_its_text(capsys):
    stream = Streamer(Bytes(), [], many=False, questions=["> a?\n", "> b?\n"])
    for request, ids in ((1, [98]), (1, [66]), (0, [97])):
        stream(request, ids)
    assert capsys.readouterr().out == "> b?\nbB> a?\na"


def test_comparison_table():
    out = Output([completion(0, [5, 6])], 0.5, Lossless(True, ""))
    header, one, two = format_comparison({"this run": out, "other": out}, {"this run": 1}).splitlines()
    assert header.split()[:2] == ["decoder", "tokens"]
    # two tokens, one forward, half a second; nothing verified
    assert one.split() == ["this", "run", "2", "0.500", "(0.000", "0.500", "0.000", "0.000)", "-", "4.0", "1/1"]
    assert two.split()[-1] == "-"


def test_comparison_of_decoders_with_several_models_goes_by_lane():
    one = completion(0, [5, 6])
    two = dataclasses.replace(
        one,
        trace=dataclasses.replace(one.trace, lanes={"target": {"verify": Spent(1)}, "drafter": {"draft": Spent(4)}}),
    )
    rows = {"this run": Output([two], 0.5, Lossless(True, "")), "plain": Output([one], 0.5, Lossless(True, ""))}
    lines = format_comparison(rows, {}).splitlines()
    assert lines[-3:] == ["forwards/token by lane", "this run  target 0.500, drafter 2.000", "plain     model 0.500"]
    assert result_of(0, {}, two)["lane_forwards"] == {"target": 1, "drafter": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A random model with a tokenizer of one word an id, and two problems."""
    folder = tmp_path_factory.mktemp("checkpoint")
    words = ["<eos>", "<mask>", "<unk>", *"abcdefghijkl"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", mask_token="<mask>", unk_token="<unk>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
    config = SDARConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=4,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        SDARForCausalLM(config).save_pretrained(folder)
    (folder / "demo.jsonl").write_text('{"prompt": "a b c", "answer": "x"}\n{"prompt": "d e", "answer": "x"}\n')
    return folder


def run(checkpoint: Path, *argv: str) -> None:
    script = dataclasses.replace(generate_ssd_policy.SCRIPT, folder=checkpoint.parent)
    script.main(["--model", str(checkpoint), "--max_new_tokens", "6", "--device", "cpu", *argv])


def test_script_decodes_the_problems_and_compares(checkpoint, capsys, tmp_path):
    run(checkpoint, "--forward_stats", "--trace", str(tmp_path / "trace.json"))
    out = capsys.readouterr().out
    assert "=== text 0\n> a b c\n" in out, "the question of a demo stands before its answer"
    for part in ("=== text 0", "=== steps of text 1", "plain diffusion", "block size one (AR)", "0/2", "lossless: no"):
        assert part in out
    traces = json.loads((tmp_path / "trace.json").read_text())
    assert [t["prompt_length"] for t in traces] == [3, 2]


def test_script_streams_what_it_returns(checkpoint, capsys):
    run(checkpoint, "--prompt", "a b", "--max_new_tokens", "8", "--block_length", "5", "--stopping_criteria_idx", "0")
    returned = capsys.readouterr().out.split("=== text 0\n")[1].split("\n\n")[0]
    run(
        checkpoint,
        "--prompt",
        "a b",
        "--max_new_tokens",
        "8",
        "--block_length",
        "5",
        "--stopping_criteria_idx",
        "0",
        "--stream",
    )
    streamed = capsys.readouterr().out
    assert returned in streamed
    assert "> " not in streamed, "who gave the prompt need not read it again"
    assert "decoder" in streamed, "the table follows"


def test_script_resumes(checkpoint, capsys, tmp_path):
    folder = str(tmp_path / "out")
    run(checkpoint, "--output_dir", folder)
    lines = (tmp_path / "out" / "outputs.jsonl").read_text().splitlines()
    assert len(lines) == 2
    (tmp_path / "out" / "outputs.jsonl").write_text(lines[0] + "\n" + lines[1][:20])
    capsys.readouterr()
    run(checkpoint, "--output_dir", folder, "--compare", "false")
    assert "1 of 2 texts are in" in capsys.readouterr().out
    again = [json.loads(line) for line in (tmp_path / "out" / "outputs.jsonl").read_text().splitlines()]
    assert [line["token_ids"] for line in again] == [json.loads(line)["token_ids"] for line in lines]


def test_rivals_of_a_resumed_run_decode_what_it_decoded(checkpoint, capsys, tmp_path):
    """Of two problems the first is on disk: every row of the table is about the second, with the second's own random numbers."""
    asked = []

    def rival(model, prompts, options, **call):
        asked.append((prompts, call["requests"]))
        return generate_ssd_policy.block_diffusion_generate(model, prompts, options, **call)

    script = dataclasses.replace(generate_ssd_policy.SCRIPT, rivals=lambda options: {"rival": (rival, options)})
    argv = ["--model", str(checkpoint), "--max_new_tokens", "6", "--device", "cpu", "--temperature", "1", "--compare"]
    argv += ["--output_dir", str(tmp_path)]
    script.main(argv)
    lines = (tmp_path / "outputs.jsonl").read_text().splitlines()
    (tmp_path / "outputs.jsonl").write_text(lines[0] + "\n")
    capsys.readouterr()
    script.main(argv)
    (prompts, requests), again = asked
    assert requests == [0, 1]
    assert again == (prompts[1:], [1])
    mine, other = (line.split() for line in capsys.readouterr().out.splitlines() if line.endswith("0/1"))
    assert mine[2:7] == other[1:6], "the same tokens at the same cost"


def test_nothing_left_to_decode(checkpoint, capsys, tmp_path):
    run(checkpoint, "--output_dir", str(tmp_path))
    capsys.readouterr()
    run(checkpoint, "--output_dir", str(tmp_path), "--compare")
    out = capsys.readouterr().out
    assert "2 of 2 texts are in" in out
    assert out.splitlines()[-1] == "nothing is left to decode"


@pytest.mark.parametrize("argv", [["--block_length", "0"], ["--prompt_file", "/absent.txt"], ["--dtype", "half"]])
def test_script_errors_are_one_line_and_exit_code_2(checkpoint, capsys, argv):
    with pytest.raises(SystemExit) as caught:
        run(checkpoint, *argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1


def test_a_shipped_checkpoint_by_its_name(checkpoint, monkeypatch, tmp_path):
    """``--model tiny`` is the folder beside the script from anywhere, unless a folder of that name is here."""
    script = dataclasses.replace(generate_ssd_policy.SCRIPT, folder=checkpoint.parent)
    source = lambda name: script.base(ScriptArguments(model=name))  # noqa: E731
    monkeypatch.chdir(tmp_path)
    assert source(None) == str(checkpoint.parent / "tiny")
    assert source(checkpoint.name) == str(checkpoint)
    assert source("SDAR/tiny") == "SDAR/tiny", "for `shared.network.loading.checkpoint_folder`"
    (tmp_path / checkpoint.name).mkdir()
    assert source(checkpoint.name) == checkpoint.name


def test_script_without_a_checkpoint(tmp_path, capsys):
    script = dataclasses.replace(generate_ssd_policy.SCRIPT, folder=tmp_path)
    with pytest.raises(SystemExit):
        script.main([])
    assert "tiny" in capsys.readouterr().err


@dataclass(frozen=True, slots=True)
class Plain(FlatOptions):
    blocks: Blocks = field(default_factory=Blocks)


def _script(name: str, options=Options, **more) -> Script:
    """A script that is parsed and not run."""
    nothing = lambda *_, **__: {}  # noqa: E731
    return Script(
        "about", Path("nowhere"), SDARForCausalLM, options, PRESETS, "small", name, nothing, nothing, "hi", **more
    )


@pytest.mark.parametrize(
    ("argv", "name", "rest"),
    [
        (["--seed", "1"], "plain", ["--seed", "1"]),
        (["--fn", "fast", "--seed", "1"], "fast", ["--seed", "1"]),
        (["--seed", "1", "--fn=fast"], "fast", ["--seed", "1"]),
        (["--fn", "fast", "--seed", "1", "--fn=plain"], "plain", ["--seed", "1"]),
    ],
)
def test_a_script_of_several(argv, name, rest):
    scripts = {n: _script(n) for n in ("plain", "fast")}
    script, left = choose_script(scripts, argv, "fn", "plain")
    assert (script.title, left) == (name, rest)
    assert (script.choice.flag, script.choice.name) == ("fn", name)


def test_the_help_of_one_of_several_names_all(capsys):
    script, rest = choose_script({n: _script(n) for n in ("plain", "fast")}, ["--fn", "fast", "--help"], "fn", "plain")
    with pytest.raises(SystemExit):
        script.run(rest)
    out = " ".join(capsys.readouterr().out.split())
    assert "--fn NAME {plain, fast}, each with flags of its own; these are of fast" in out
    assert "single flags go on top {small, paper}" in out


def test_a_flag_of_another_script_says_whose_it_is():
    scripts = {"plain": _script("plain", options=Plain), "fast": _script("fast"), "faster": _script("faster")}
    script, rest = choose_script(scripts, ["--cache_ver"], "fn", "plain")
    with pytest.raises(UserError, match=r"'cache_ver' is not one of plain\. Allowed with --fn fast or --fn faster"):
        script.run(rest)
    with pytest.raises(UserError, match="unknown flag 'cache_vr'"):
        script.run(["--cache_vr"])


def test_a_script_may_refuse_options_before_it_loads_anything():
    def check(options):
        raise UserError("not these")

    with pytest.raises(UserError, match="not these"):
        _script("plain", check=check).run(["--model", "nowhere"])


def test_an_error_about_what_the_preset_sets_says_so():
    presets = {"small": {"acceptance": "exact"}}
    with pytest.raises(UserError, match=r"preset small sets acceptance, --acceptance on the command line overrides it"):
        parsed("--preset", "small", "--no_resample", presets=presets)
    with pytest.raises(UserError) as error:
        parsed("--preset", "small", "--no_resample", "--acceptance", "exact", presets=presets)
    assert "preset" not in str(error.value)


def test_a_preset_that_nobody_asked_for_gives_way(capsys):
    """A published command line works on the checkpoint that ships, whose preset accepts by another rule."""
    presets = {"tiny": {"acceptance": "exact", "block_length": 8}}
    script, options, preset = parse(Options, presets, ["--no_resample"], "about", "tiny")
    assert (script.preset, preset) == (None, "tiny")
    flat = options.to_flat()
    assert (flat["acceptance"], flat["allow_resample"], flat["block_length"]) == ("published", False, 8)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: acceptance=exact of preset tiny does not apply: allow_resample is False")
    with pytest.raises(UserError, match="allow_resample is False"):
        parse(Options, presets, ["--no_resample", "--acceptance", "exact"], "about", "tiny")


@pytest.mark.parametrize("argv", [["--fn", "fasst"], ["--fn"]])
def test_a_script_that_is_not_there(argv):
    with pytest.raises(UserError, match=r"fn .*plain, fast"):
        choose_script({n: _script(n) for n in ("plain", "fast")}, argv, "fn", "plain")


def test_traces_are_of_whole_runs(checkpoint, capsys, tmp_path):
    """Asked for where they can be written, and not where texts of an earlier run have none."""
    assert "no such folder" in _refused(checkpoint, capsys, "--trace", str(tmp_path / "none" / "x.json"))
    script = dataclasses.replace(generate_ssd_policy.SCRIPT, folder=checkpoint.parent)
    folder = str(tmp_path / "out")
    script.main(["--model", str(checkpoint), "--max_new_tokens", "6", "--device", "cpu", "--output_dir", folder])
    assert "without their traces" in _refused(
        checkpoint, capsys, "--output_dir", folder, "--trace", str(tmp_path / "x.json")
    )


def test_a_late_process_does_not_take_the_firsts_texts_for_old_ones(checkpoint, monkeypatch, tmp_path):
    """Rank 1 of two comes to the new folder after rank 0 has written there."""
    folder = tmp_path / "out"
    run(checkpoint, "--output_dir", str(folder))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda told, src: told.__setitem__(slice(None), [{}, None]))
    monkeypatch.setattr(dist, "all_gather_object", lambda room, mine: room.__setitem__(1, mine))
    run(checkpoint, "--output_dir", str(folder), "--trace", str(tmp_path / "trace.json"))
    assert [json.loads(line)["index"] for line in (folder / "outputs.rank1.jsonl").open()] == [1]


def test_an_unknown_flag_is_one_short_line():
    with pytest.raises(UserError) as caught:
        parsed("--blok_length", "4")
    assert "did you mean block_length" in str(caught.value)
    assert str(caught.value).endswith("flags, --help lists them")
    assert len(str(caught.value)) < 160


def test_results_of_another_dtype_are_refused(checkpoint, capsys, tmp_path):
    folder = str(tmp_path / "out")
    script = dataclasses.replace(generate_ssd_policy.SCRIPT, folder=checkpoint.parent)
    script.main(["--model", str(checkpoint), "--max_new_tokens", "6", "--device", "cpu", "--output_dir", folder])
    assert "other settings" in _refused(checkpoint, capsys, "--output_dir", folder, "--dtype", "float64")


def _refused(checkpoint: Path, capsys, *argv: str) -> str:
    """What the script says on standard error, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(checkpoint, *argv)
    assert stop.value.code == 2
    return capsys.readouterr().err
