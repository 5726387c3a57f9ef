"""Decode with LLaDA2. ``python example_llada.py --generate_fn {nocache,cached,ssd_policy} --help`` lists every flag of a decoder.

python example_llada.py                                        # a threshold and token editing, on a cache
python example_llada.py --generate_fn ssd_policy --preset quality
python example_llada.py --generate_fn cached --model inclusionAI/LLaDA2.1-mini --prompt "Write a function ..."
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.errors import end_on_interrupt

    end_on_interrupt()

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from llada2.generate_policy_utils import generate_ssd_policy
from llada2.generate_utils import generate_cached, generate_nocache
from llada2.modeling_llada2_moe import LLaDA2MoeModelLM
from llada2.options import (
    DEFAULT_PROMPT,
    NOCACHE_PRESETS,
    PLAIN_PRESETS,
    PRESETS,
    NoCacheOptions,
    Options,
    StandardOptions,
    plain,
)
from shared.errors import run_main
from shared.scripts.cli import Script, choose_script


def one_token(options: NoCacheOptions) -> StandardOptions:
    """The same settings at block size one, which is autoregressive decoding."""
    return plain(options).replace(block_length=1, editing_threshold=1.0, max_post_steps=0)


def plain_rivals(generate: Callable, options: NoCacheOptions) -> dict:
    """What the demo compares ``generate``, which decodes with a threshold, with: itself without edits, and one token at a time."""
    return {
        "without editing": (generate, options.replace(editing_threshold=1.0, max_post_steps=0)),
        "block size one (AR)": (generate_cached, one_token(options)),
    }


def rivals(options: Options) -> dict:
    """What the demo compares S2D2 with: the same settings without speculation, and one token at a time."""
    return {
        "plain diffusion": (generate_cached, plain(options)),
        "block size one (AR)": (generate_cached, one_token(options)),
    }


def _script(title: str, generate, options: type, presets: dict, compared) -> Script:
    return Script(
        description=__doc__,
        folder=Path(__file__).parent,
        model_class=LLaDA2MoeModelLM,
        options=options,
        presets=presets,
        shipped="tiny",
        title=f"LLaDA2, {title}",
        generate=generate,
        rivals=compared,
        default_prompt=DEFAULT_PROMPT,
    )


SCRIPTS = {
    "nocache": _script(
        "no cache", generate_nocache, NoCacheOptions, NOCACHE_PRESETS, partial(plain_rivals, generate_nocache)
    ),
    "cached": _script(
        "threshold and editing", generate_cached, StandardOptions, PLAIN_PRESETS, partial(plain_rivals, generate_cached)
    ),
    "ssd_policy": _script("S2D2", generate_ssd_policy, Options, PRESETS, rivals),
}


def run(argv: Sequence[str] | None = None) -> None:
    """Run the script that ``--generate_fn`` names (default: cached) on the rest of the command line."""
    script, rest = choose_script(SCRIPTS, argv, "generate_fn", "cached")
    script.run(rest)


def main(argv: Sequence[str] | None = None) -> None:
    """Run; bad input is one line on standard error and exit code 2."""
    run_main(lambda: run(argv))


if __name__ == "__main__":
    main()
