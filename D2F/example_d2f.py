"""Decode with D2F. ``python example_d2f.py --generate_fn {d2f,ssd} --help`` lists every flag of a decoder.

python example_d2f.py                                          # several blocks in flight, on the shipped LLaDA checkpoint
python example_d2f.py --model dream --generate_fn ssd          # S2D2 on top, on the shipped Dream checkpoint
python example_d2f.py --model llada --pretrained GSAI-ML/LLaDA-8B-Instruct --adapter SJTU-Deng-Lab/D2F_LLaDA_Instruct_8B_Lora
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.errors import end_on_interrupt

    end_on_interrupt()

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from d2f.generation_utils import generate_block_single, generate_block_speculative
from d2f.modeling_d2f import BACKENDS, LLaDAForD2F, network_of
from d2f.options import DEFAULT_PROMPT, PLAIN_PRESETS, PRESETS, PROMPTS, Options, StandardOptions, plain
from d2f.stats import format_stats
from shared.errors import UserError, run_main
from shared.family import shipped_folder
from shared.network.loading import checkpoint_folder
from shared.options import option
from shared.scripts.cli import Script, ScriptArguments, choose_script
from shared.scripts.models import model_type

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Arguments(ScriptArguments):
    model: str | None = option(
        None, "llada or dream, which ship here, or a checkpoint: a folder or a hub id; default: llada"
    )
    prompt: str | None = option(
        None, f"the prompt, or one of {' '.join(PROMPTS)}; default: problems that come with the checkpoint"
    )
    pretrained: str | None = option(None, "the base network's checkpoint, of the kind --model names")
    adapter: str | None = option(
        None, "the D2F adapter laid on it: a folder or a hub id; default: that of a shipped checkpoint, else none"
    )
    force_adapter: bool = option(False, "lay it on another base than the one it was trained on")

    def __post_init__(self):
        ScriptArguments.__post_init__(self)
        if self.prompt in PROMPTS:
            object.__setattr__(self, "prompt", PROMPTS[self.prompt])
        if self.pretrained is not None and self.model not in (None, *BACKENDS):
            raise UserError(
                f"model {self.model!r} and pretrained are both given. Allowed with pretrained: {', '.join(BACKENDS)}"
            )


@dataclass(frozen=True)
class D2FScript(Script):
    """A script whose network is a base and an adapter, in one of two kinds."""

    def shipped_name(self, script: Arguments) -> str | None:
        """``llada`` or ``dream`` where that is what is decoded with."""
        if script.pretrained is not None:
            return None
        if script.model is None:
            return next(iter(BACKENDS))
        name = script.model.removeprefix("D2F/")
        if name in BACKENDS and not Path(script.model).is_dir():
            return name
        folder = (shipped_folder(name) or Path(name)).resolve()
        return next((n for n in BACKENDS if folder == (HERE / "tiny" / n).resolve()), None)

    def ships(self, script: Arguments) -> bool:
        return self.shipped_name(script) is not None

    def base(self, script: Arguments) -> str:
        name = self.shipped_name(script)
        return str(HERE / "tiny" / name) if name else script.pretrained or script.model

    def named(self, script: Arguments, source: str) -> str:
        adapter = self.adapter(script)
        return f"{self.shipped_name(script) or source} {'with its adapter' if adapter else 'without an adapter'}"

    def adapter(self, script: Arguments) -> str | None:
        """What is laid on the base."""
        if script.adapter is not None or self.shipped_name(script) is None:
            return script.adapter
        return str(Path(self.base(script)) / "adapter")

    def checkpoints(self, script: Arguments, source: str) -> dict[str, str]:
        adapter = self.adapter(script)
        return {"model": source, "adapter": adapter} if adapter else {"model": source}

    def load(self, script: Arguments, source: str, world, device):
        if world.tensor > 1:
            raise UserError(
                f"tensor_parallel is {world.tensor}. Allowed: 1, a base and its adapter are not cut over processes"
            )
        kind = model_type(source) or ""
        if script.pretrained is not None and script.model not in (None, kind.lower()):
            raise UserError(
                f"pretrained {source!r} is of model_type {kind!r}. Allowed with model {script.model}: {script.model}"
            )
        how = {"adapter": self.adapter(script), "force_adapter": script.force_adapter}
        if how["adapter"] is None:
            print(
                "note: no --adapter, so the base decodes alone; D2F's adapters teach it to see blocks", file=sys.stderr
            )
        return network_of(kind).from_pretrained(checkpoint_folder(source), dtype=script.dtype, device=device, **how)


def one_token(options: StandardOptions) -> StandardOptions:
    """The same settings at block size one, which is autoregressive decoding."""
    return options.replace(block_length=1, block_add_threshold=1.0)


def plain_rivals(options: StandardOptions) -> dict:
    """What the demo compares a pipeline of blocks with: one block at a time, and one token at a time."""
    return {
        "one block at a time": (generate_block_single, options.replace(block_add_threshold=1.0)),
        "block size one (AR)": (generate_block_single, one_token(options)),
    }


def rivals(options: Options) -> dict:
    """What the demo compares S2D2 with: the same settings without speculation, and one token at a time."""
    return {
        "plain D2F": (generate_block_single, plain(options)),
        "block size one (AR)": (generate_block_single, one_token(plain(options))),
    }


def _script(title: str, generate, options: type, presets: dict, compared) -> D2FScript:
    return D2FScript(
        description=__doc__,
        folder=HERE,
        model_class=LLaDAForD2F,
        options=options,
        presets=presets,
        shipped="tiny",
        title=f"D2F, {title}",
        generate=generate,
        rivals=compared,
        default_prompt=DEFAULT_PROMPT,
        arguments=Arguments,
        stats_of=format_stats,
    )


SCRIPTS = {
    "d2f": _script("blocks in flight", generate_block_single, StandardOptions, PLAIN_PRESETS, plain_rivals),
    "ssd": _script("S2D2", generate_block_speculative, Options, PRESETS, rivals),
}


def run(argv: Sequence[str] | None = None) -> None:
    """Run the script that ``--generate_fn`` names (default: d2f) on the rest of the command line."""
    script, rest = choose_script(SCRIPTS, argv, "generate_fn", "d2f")
    script.run(rest)


def main(argv: Sequence[str] | None = None) -> None:
    """Run; bad input is one line on standard error and exit code 2."""
    run_main(lambda: run(argv))


if __name__ == "__main__":
    main()
