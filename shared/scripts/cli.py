"""What the example scripts of all families share: flags, prompts, streaming, results on disk, the printed summary.

Every decode option is a flag under its own name; everything else a script takes is a field of `ScriptArguments`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tqdm import tqdm

from shared.errors import UserError, run_main, unknown_name
from shared.family import shipped_folder
from shared.network.loading import checkpoint_folder, load_tokenizer, resolve_device
from shared.options import ALIASES, FlatOptions, check, coerce, option
from shared.output import Completion, Output
from shared.scripts import tensor_parallel
from shared.scripts.claims import claimed, join
from shared.scripts.distributed import World
from shared.scripts.files import check_file, check_writable, write_whole
from shared.scripts.identity import code_version, files_of, prompts_as_settings
from shared.scripts.judging import is_solved
from shared.scripts.prompts import as_typed, encode_prompt, read_prompt_file, spell_out
from shared.scripts.store import Store
from shared.trace import Trace, format_trace


@dataclass(frozen=True, slots=True)
class ScriptArguments:
    model: str | None = option(
        None, "checkpoint: a folder, one that ships (tiny, SDAR/tiny) or a hub id; default: tiny, which ships here"
    )
    prompt: str | None = option(None, "the prompt; default: problems that come with the checkpoint")
    prompt_file: str | None = option(
        None, "prompts from a file: JSONL ('prompt' or 'messages' a line), else one a line"
    )
    batch_size: int = option(1, "texts in flight at a time; waiting prompts join as rows finish", low=1)
    output_dir: str | None = option(None, "append results there as they finish (outputs.jsonl); a second run resumes")
    stream: bool = option(False, "print text as blocks finish")
    trace: str | None = option(None, "write the traces to this JSON file")
    forward_stats: bool = option(False, "print each step's decoding order and tokens")
    preset: str | None = option(None, "a named setting; single flags go on top")
    seed: int = option(42, "seed of every random draw", low=0, high=2**63 - 1)
    device: str = option("auto", "auto, cpu, cuda, cuda:N")
    dtype: str = option("auto", "auto, float32, bfloat16, float16, float64")
    tensor_parallel: int = option(1, "processes that hold one model together (torchrun --nproc_per_node=N)", low=1)
    prompt_length: int | None = option(None, "keep at most this many tokens of a prompt, the last ones", low=1)
    no_chat: bool = option(False, "send the prompt without the chat template")
    compare: bool | None = option(None, "also run plain diffusion and block size one; default: when no prompt is given")
    trust_remote_code: bool = option(False, "accepted for old command lines; this repository's own code is always used")

    def __post_init__(self):
        check(self)
        if self.model is not None and not self.model.strip():
            raise UserError("model '' is empty. Allowed: a checkpoint folder, one that ships here, a hub id")
        if self.prompt is not None and self.prompt_file is not None:
            raise UserError("prompt and prompt_file are both given. Allowed: one of them")
        if self.trace is not None and not Path(self.trace).parent.is_dir():
            raise UserError(f"trace {self.trace!r}: no such folder. Allowed: a file in a folder that is there")
        if self.trace is not None:
            check_file("trace", self.trace)
        if self.output_dir == "":
            raise UserError("output_dir is empty. Allowed: a folder")
        if self.output_dir is not None:
            check_writable(Path(self.output_dir))
        if self.compare and self.tensor_parallel > 1:
            raise UserError("compare and tensor_parallel above 1 are both given. Allowed: one of them")


SCRIPT_ALIASES = {
    "model": ("model", "model_dir"),
    "forward_stats": ("forward_stats", "return_forward_stats", "return_decoding_order", "record_decoding_order"),
    "device": ("device", "device_map"),
    "prompt": ("prompt", "p"),
}
# Flags whose bare form says no.
NEGATIONS = {"no_resample": "allow_resample"}


class _Parser(argparse.ArgumentParser):
    def __init__(self, **flat):
        super().__init__(**flat)
        # What may follow a flag although it begins with a dash; argparse's own pattern (before Python 3.14) lacks exponents.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)

    def error(self, message: str):
        raise UserError(message)


def add_flag(group, parser: _Parser, name: str, kind: Any, field: dataclasses.Field, spellings: Sequence[str]) -> None:
    """One field as a flag. Values stay strings here: `shared.options.coerce` is the only place that reads them."""
    options = list(get_args(kind)) if type(None) in get_args(kind) else [kind]
    literal = next((k for k in options if get_origin(k) is Literal), None)
    choices = f" {{{', '.join(get_args(literal))}}}" if literal else ""
    default = "" if field.default is None else f" (default: {field.default})"
    flags = [f"--{s}" if len(s) > 1 else f"-{s}" for s in spellings]
    help = (field.metadata["help"] + choices + default).replace("%", "%%")
    if bool in options:
        group.add_argument(
            *flags, nargs="?", const=True, metavar="BOOL", default=argparse.SUPPRESS, dest=name, help=help
        )
    elif any(get_origin(k) is tuple for k in options):
        group.add_argument(*flags, nargs="+", metavar="ID", default=argparse.SUPPRESS, dest=name, help=help)
    else:
        metavar = "NAME" if literal else next(k for k in options if k is not type(None)).__name__.upper()
        group.add_argument(*flags, metavar=metavar, default=argparse.SUPPRESS, dest=name, help=help)


@dataclass(frozen=True)
class Choice:
    """The flag that names one of several ``scripts`` behind one file, and the ``name`` it gave."""

    flag: str
    name: str
    scripts: Mapping[str, Script]

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """For ``--help`` alone: the flag is off the command line when the parser sees it."""
        names = ", ".join(self.scripts)
        group = parser.add_argument_group("decoder")
        group.add_argument(
            f"--{self.flag}",
            metavar="NAME",
            default=argparse.SUPPRESS,
            help=f"{{{names}}}, each with flags of its own; these are of {self.name}",
        )

    def owners(self, flag: str) -> list[str]:
        """The scripts that have ``--flag``."""
        flags = lambda s: build_parser(s.options, "", (), s.arguments)._option_string_actions  # noqa: E731
        return [n for n, s in self.scripts.items() if f"--{flag}" in flags(s)]


def build_parser(
    options: type[FlatOptions],
    description: str,
    presets: Sequence[str] = (),
    arguments: type[ScriptArguments] = ScriptArguments,
) -> _Parser:
    """A parser with a flag for every field of ``arguments`` and of each group of ``options``; only flags given appear in its result."""
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for title, group in {"script": arguments, **options.groups()}.items():
        section, hints = parser.add_argument_group(title), get_type_hints(group)
        for f in dataclasses.fields(group):
            spellings = {**ALIASES, **SCRIPT_ALIASES}.get(f.name, (f.name,))
            add_flag(section, parser, f.name, hints[f.name], f, spellings)
            if f.name == "preset" and presets:
                parser._option_string_actions["--preset"].help += f" {{{', '.join(presets)}}}"
            for negation, name in NEGATIONS.items():
                if name == f.name:
                    section.add_argument(f"--{negation}", dest=name, action="store_false", default=argparse.SUPPRESS)
    if "temperature" in options.names():
        parser.add_argument(
            "--do_sample", nargs="?", const=True, default=argparse.SUPPRESS, help="false: temperature 0"
        )
    return parser


def parse(
    options: type[FlatOptions],
    presets: Mapping[str, Mapping],
    argv: Sequence[str] | None,
    description: str,
    shipped: str,
    choice: Choice | None = None,
    ships: Callable[[ScriptArguments], bool] = lambda script: script.model is None,
    arguments: type[ScriptArguments] = ScriptArguments,
) -> tuple[ScriptArguments, FlatOptions, str | None]:
    """``(script arguments, decode options, name of the preset in use)``. With the checkpoint that ships (``ships(script)``) the preset
    is ``shipped``; where flags contradict that, it gives way with a note."""
    parser = build_parser(options, description, tuple(presets), arguments)
    if choice is not None:
        choice.add_to(parser)
    given, strange = parser.parse_known_args(argv)
    if strange:
        if not strange[0].startswith("-"):
            raise UserError(f"{strange[0]!r} belongs to no flag. Allowed: --prompt and the text, in quotes")
        raise unknown_flag(strange[0].split("=")[0].lstrip("-"), parser, choice)
    given, hints = vars(given), get_type_hints(arguments)
    script = arguments(**{k: coerce(k, given.pop(k), hints[k]) for k in hints if k in given})
    preset = script.preset or (shipped if ships(script) else None)
    if preset is not None and preset not in presets:
        raise unknown_name("preset", preset, presets)
    below = presets.get(preset, {})
    try:
        return script, options.from_flat(below, **given), preset
    except UserError as error:
        ours = [k for k in below if k not in given and re.search(rf"\b{k}\b", str(error))]
        if not ours:
            raise
        if script.preset is None:  # nobody asked for it, so what was asked for wins
            found = options.from_flat({k: v for k, v in below.items() if k not in ours}, **given)
            values = " ".join(f"{k}={below[k]}" for k in ours)
            print(f"note: {values} of preset {preset} does not apply: {error}", file=sys.stderr)
            return script, found, preset
        raise UserError(
            f"{error}; preset {preset} sets {ours[0]}, --{ours[0]} on the command line overrides it"
        ) from error


def unknown_flag(flag: str, parser: argparse.ArgumentParser, choice: Choice | None) -> UserError:
    """The error for a ``flag`` that ``parser`` does not have: whose it is, or what it may have meant."""
    owners = choice.owners(flag) if choice else []
    if owners:
        named = " or ".join(f"--{choice.flag} {name}" for name in owners)
        return UserError(f"flag {flag!r} is not one of {choice.name}. Allowed with {named}")
    flags = sorted({s.lstrip("-") for a in parser._actions for s in a.option_strings if s.startswith("--")})
    near = difflib.get_close_matches(flag, flags, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    return UserError(f"unknown flag {flag!r}{hint} Allowed: {len(flags)} flags, --help lists them")


def load_prompts(script: ScriptArguments, tokenizer, demo: Path, default: str) -> tuple[list[dict], list[list[int]]]:
    """The records to decode and their token ids. ``demo``: the checkpoint's own problems; ``default``: used where it has none."""
    if script.prompt_file is not None:
        records = read_prompt_file(script.prompt_file)
    elif script.prompt is not None:
        records = [{"prompt": as_typed(script.prompt)}]
    else:
        records = read_prompt_file(demo) if demo.is_file() else [{"prompt": default}]
    try:
        prompts = [encode_prompt(tokenizer, record, chat=not script.no_chat) for record in records]
    except UserError as error:
        raise UserError(f"{script.prompt_file or 'prompt'}: {error}") from error
    return records, prompts


def fit_prompts(script: ScriptArguments, tokenizer, prompts: Sequence[list[int]], mask_id: int) -> list[list[int]]:
    """``prompts`` without mask tokens, cut to their last ``prompt_length`` tokens: there stand the question and the header of the answer."""
    kept = slice(None if script.prompt_length is None else -script.prompt_length, None)
    return [spell_out(tokenizer, ids, mask_id)[kept] for ids in prompts]


def question_of(script: ScriptArguments, record: dict) -> str:
    """The prompt of a problem that came with the checkpoint, ``>`` before each line; empty if the user gave the prompts."""
    if script.prompt is not None or script.prompt_file is not None:
        return ""
    return "".join(f"> {line}\n" for line in record.get("prompt", "").splitlines())


def result_of(index: int, record: dict, completion: Completion) -> dict:
    """A finished text as `--output_dir` keeps it: what its prompt's record held, the text and what it cost."""
    own = {"index": index}
    return {
        **own,
        **record,
        **own,  # also where the record brings one of its own
        "text": completion.text,
        "token_ids": completion.tokens,
        "forwards": completion.trace.forwards,
        "lane_forwards": {
            lane: sum(spent.forwards for spent in kinds.values()) for lane, kinds in completion.trace.lanes.items()
        },
        "decided": completion.trace.counts(),
        "seconds": round(completion.seconds, 4),
    }


def found_texts(script: ScriptArguments, run: dict) -> dict[int, dict]:
    """The results of earlier runs in the output folder, by index; refused where they do not go with this run."""
    found = Store(script.output_dir, "outputs", "index", run=run).found
    if found and script.trace is not None:
        raise UserError(
            f"output_dir {script.output_dir!r} holds texts without their traces. Allowed with trace: a new folder"
        )
    return found


class Streamer:
    """Prints text block by block: what all ids so far decode to, less what has been printed, up to the first stop token.

    ``questions``: what goes before the text of each request.
    """

    def __init__(self, tokenizer, stop_ids: Sequence[int], many: bool, questions: Sequence[str] = ()):
        self.tokenizer, self.stop_ids, self.many, self.questions = tokenizer, set(stop_ids), many, questions
        self.ids: dict[int, list[int]] = {}
        self.printed: dict[int, str] = {}

    def __call__(self, request: int, new_ids: list[int]) -> None:
        if request not in self.ids and self.questions:
            print(self.questions[request], end="")
        ids = self.ids.setdefault(request, [])
        if self.stop_ids & set(ids):
            return
        ids.extend(new_ids)
        end = next((k for k, t in enumerate(ids) if t in self.stop_ids), len(ids))
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True).rstrip("\ufffd")
        piece, self.printed[request] = text[len(self.printed.get(request, "")) :], text
        if self.many:
            print(f"[{request}] {piece}", flush=True)
        else:
            print(piece, end="", flush=True)


def print_texts(
    script: ScriptArguments,
    output: Output,
    tokenizer,
    records: Sequence[dict],
    stats_of: Callable[[Trace], str] | None = None,
) -> None:
    """Texts of ``records`` (unless streamed), traces and ``stats_of`` them if asked for, and the trace file."""
    for completion in output.completions:
        if not script.stream and script.output_dir is None:
            question = question_of(script, records[completion.request])
            print(f"=== text {completion.request}\n{question}{completion.text}\n")
        if script.forward_stats:
            more = "" if stats_of is None else f"{stats_of(completion.trace)}\n"
            print(f"=== steps of text {completion.request}\n{format_trace(completion.trace, tokenizer)}\n{more}")
    if script.trace is not None:
        write_whole(script.trace, json.dumps([c.trace.to_json() for c in output.completions]) + "\n")


def format_comparison(rows: Mapping[str, Output], solved: Mapping[str, int | None]) -> str:
    """A table of decoders over the same prompts: what each token cost and how much of the drafts was accepted."""
    width = max(map(len, rows))
    lines = [
        f"{'decoder':{width}s}  tokens  forwards/token (prefill draft verify commit)  accepted/verify  tokens/s  solved"
    ]
    for name, out in rows.items():
        kinds = "  ".join(f"{out.forwards[k] / max(1, out.token_count):.3f}" for k in out.forwards)
        accepted = f"{out.accepted_per_verify:.2f}" if out.forwards["verify"] else "-"
        cost = f"{out.forwards_per_token:6.3f}" if out.token_count else f"{'-':>6s}"
        right = "-" if solved.get(name) is None else f"{solved[name]}/{len(out.completions)}"
        lines.append(
            f"{name:{width}s}  {out.token_count:6d}  {cost}         ({kinds})  {accepted:>15s}  "
            f"{out.tokens_per_second:8.1f}  {right:>6s}"
        )
    if len({lane for out in rows.values() for lane in out.lanes}) > 1:
        lines += ["", f"{'forwards/token by lane':{width}s}"]
        for name, out in rows.items():
            lanes = ", ".join(f"{lane} {n:.3f}" for lane, n in out.lane_forwards_per_token.items())
            lines.append(f"{name:{width}s}  {lanes}")
    return "\n".join(lines)


def choose_script(
    scripts: Mapping[str, Script], argv: Sequence[str] | None, flag: str, default: str
) -> tuple[Script, list[str]]:
    """Take ``--flag NAME`` off a command line (the last of several counts): the script it names out of ``scripts``, and the rest of the line."""
    words, rest, name = iter(sys.argv[1:] if argv is None else argv), [], default
    for word in words:
        key, equals, value = word.partition("=")
        if key == f"--{flag}":
            name = value if equals else next(words, "")
        else:
            rest.append(word)
    if name not in scripts:
        raise unknown_name(flag, name, scripts)
    return dataclasses.replace(scripts[name], choice=Choice(flag, name, scripts)), rest


@dataclass(frozen=True)
class Script:
    """An example script: parse, load, generate, print. ``python FILE.py --help`` is its manual.

    ``generate`` is the family's decoder; ``rivals(options)`` names the decoders it is compared with, each ``(function, options)``; ``shipped`` is
    the preset used with the tiny checkpoint in ``folder``; ``default_prompt`` is for checkpoints that bring no problems of their own. ``check`` may
    refuse options before anything is loaded; ``choice`` is what `choose_script` chose it from. ``arguments`` may add flags of the script's own, and
    ``stats_of`` what ``--forward_stats`` prints beside the steps.
    """

    description: str
    folder: Path
    model_class: type
    options: type[FlatOptions]
    presets: Mapping[str, Mapping]
    shipped: str
    title: str
    generate: Callable[..., Output]
    rivals: Callable[[FlatOptions], dict[str, tuple[Callable[..., Output], FlatOptions]]]
    default_prompt: str
    check: Callable[[FlatOptions], None] = lambda options: None
    choice: Choice | None = None
    arguments: type[ScriptArguments] = ScriptArguments
    stats_of: Callable[[Trace], str] | None = None

    def main(self, argv: Sequence[str] | None = None) -> None:
        """Run; bad input is one line on standard error and exit code 2."""
        run_main(lambda: self.run(argv))

    def run(self, argv: Sequence[str] | None) -> None:
        what = (self.options, self.presets, argv, self.description, self.shipped, self.choice, self.ships)
        script, options, preset = parse(*what, self.arguments)
        self.check(options)
        if script.trust_remote_code:
            print("note: --trust_remote_code has no effect, this repository's own code is used", file=sys.stderr)
        world = World.from_environment(script.tensor_parallel)
        with claimed(script.output_dir if world.rank == 0 else None, several=world.size > 1):
            self.decode_all(script, options, preset, world)

    def decode_all(self, script: ScriptArguments, options, preset: str | None, world: World) -> None:
        """Load, decode, print."""
        source = self.base(script)
        tokenizer = load_tokenizer(source)
        records, prompts = load_prompts(
            script, tokenizer, checkpoint_folder(source) / "demo.jsonl", self.default_prompt
        )
        device = resolve_device(world.device(script.device))
        model = self.load(script, source, world, device)
        mask_id, _ = model.special_ids(options.blocks.mask_id, options.blocks.stopping_criteria_idx, tokenizer)
        prompts = fit_prompts(script, tokenizer, prompts, mask_id)
        if world.rank == 0:
            print(f"{self.title} | {self.named(script, source)} | {model.device.type}, {str(model.dtype)[6:]}")
            values = " ".join(f"{k}={v}" for k, v in self.presets.get(preset, {}).items())
            print(f"preset {preset}: {values}\n" if preset else "no preset\n")
        output = world.gather(self.decode(script, options, model, tokenizer, records, prompts, source, world))
        world.leave()
        if output is None:
            if world.rank == 0:
                print("nothing is left to decode")
            return
        print_texts(script, output, tokenizer, records, self.stats_of)
        rows = {"this run": output}
        unasked = script.compare is None and script.prompt is None and script.prompt_file is None and world.size == 1
        if script.compare or unasked:
            asked = [c.request for c in output.completions]  # after a resume, not all prompts
            call = {"seed": script.seed, "batch_size": script.batch_size, "tokenizer": tokenizer, "requests": asked}
            for name, (generate, rival) in self.rivals(options).items():
                rows[name] = generate(model, [prompts[k] for k in asked], rival, **call)
        by_request = {
            name: [is_solved(records[c.request], c.text) for c in out.completions] for name, out in rows.items()
        }
        solved = {name: None if None in found else sum(found) for name, found in by_request.items()}
        print(format_comparison(rows, solved))
        print(f"\nlossless: {output.lossless}")

    def is_shipped(self, model: str | None) -> bool:
        """Is that the checkpoint in the script's folder, by whatever name?"""
        if model is None:
            return True
        return (shipped_folder(model) or Path(self.source(model))).resolve() == (self.folder / "tiny").resolve()

    def source(self, model: str | None) -> str:
        """The checkpoint to load: ``model``, or the shipped one. A name of a checkpoint in the script's folder works from any folder."""
        if model is None:
            return str(self.folder / "tiny")
        beside = self.folder / model
        return str(beside) if not Path(model).exists() and (beside / "config.json").is_file() else model

    # What a script whose checkpoint is named by more flags than --model says otherwise.

    def ships(self, script: ScriptArguments) -> bool:
        """Is the preset of the shipped checkpoint the default?"""
        return self.is_shipped(script.model)

    def base(self, script: ScriptArguments) -> str:
        """The checkpoint of the network, with its tokenizer."""
        return self.source(script.model)

    def named(self, script: ScriptArguments, source: str) -> str:
        """The checkpoint in the header."""
        return "tiny" if self.ships(script) else source

    def checkpoints(self, script: ScriptArguments, source: str) -> dict[str, str]:
        """All that is loaded, by role."""
        return {"model": source}

    def load(self, script: ScriptArguments, source: str, world: World, device):
        """The network."""
        return tensor_parallel.load(self.model_class, source, world, dtype=script.dtype, device=device)

    def made_by(self, script: ScriptArguments, options, model, prompts, source: str) -> dict:
        """All that decides what the texts are."""
        return {
            "decoder": self.title,
            "seed": script.seed,
            "dtype": str(model.dtype)[6:],
            "options": options.to_flat(),
            "file": {
                file: told
                for files in files_of(self.checkpoints(script, source)).values()
                for file, told in files.items()
            },
            "code version": code_version(self.folder),
            "prompts": len(prompts),
            "prompt": prompts_as_settings(prompts),
        }

    def decode(self, script, options, model, tokenizer, records, prompts, source, world) -> Output | None:
        """Decode this process's share of what is not on disk yet, printing or storing each text as it finishes."""
        found, run = {}, None
        if script.output_dir is not None:
            run = self.made_by(script, options, model, prompts, source)
            # One process reads the folder, before any writes there.
            found = world.decided(lambda: found_texts(script, run))
            join(script.output_dir)
        results = Store(script.output_dir, "outputs", "index", rank=world.rank, run=run, found=found)
        todo = [k for k in world.share(range(len(prompts))) if k not in results.found]
        if results.found and world.rank == 0:
            print(f"{len(results.found)} of {len(prompts)} texts are in {script.output_dir} already")
        if not todo:
            return None
        _, stop_ids = model.special_ids(options.blocks.mask_id, options.blocks.stopping_criteria_idx, tokenizer)
        questions = [question_of(script, record) for record in records]
        streamer = None
        if script.stream and world.leads:
            streamer = Streamer(tokenizer, stop_ids, script.batch_size > 1, questions)
        bar = tqdm(
            total=len(todo), unit="text", disable=script.stream or len(todo) < 2 or world.rank > 0, file=sys.stderr
        )

        def finished(completion: Completion) -> None:
            if not world.leads:
                return
            results.append(result_of(completion.request, records[completion.request], completion))
            bar.update()
            if script.stream and script.batch_size == 1:
                print(
                    f"\n--- {len(completion.tokens)} tokens, {completion.trace.total_forwards} forwards\n", flush=True
                )

        with results, bar:
            return self.generate(
                model,
                [prompts[k] for k in todo],
                options,
                requests=todo,
                seed=script.seed,
                batch_size=script.batch_size,
                tokenizer=tokenizer,
                on_block=streamer,
                on_finish=finished,
            )
