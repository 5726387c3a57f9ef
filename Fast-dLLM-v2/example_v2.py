"""Decode with Fast-dLLM v2. ``python example_v2.py --generate_fn {fast,ssd,ssd_policy} --help`` lists every flag of a decoder.

python example_v2.py                                           # plain: blocks, small blocks, a threshold
python example_v2.py --generate_fn ssd_policy --preset paper-a
python example_v2.py --generate_fn ssd --model Efficient-Large-Model/Fast_dLLM_v2_7B --prompt "Write a function ..."
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.errors import end_on_interrupt

    end_on_interrupt()

from collections.abc import Sequence
from pathlib import Path

from fast_dllm_v2.generate_policy_utils import generate_ssd_policy
from fast_dllm_v2.generate_utils import generate_fast, generate_ssd, only_span_length
from fast_dllm_v2.modeling_fast import Fast_dLLM_QwenForCausalLM
from fast_dllm_v2.options import DEFAULT_PROMPT, PLAIN_PRESETS, PRESETS, SSD_PRESETS, Options, StandardOptions, plain
from shared.errors import run_main
from shared.scripts.cli import Script, choose_script


def one_token(options: StandardOptions) -> StandardOptions:
    """The same settings at block size one, which is autoregressive decoding."""
    return options.replace(block_length=1, small_block_length=1)


def plain_rivals(options: StandardOptions) -> dict:
    """What the demo compares plain decoding with."""
    return {"block size one (AR)": (generate_fast, one_token(options))}


def rivals(options: Options) -> dict:
    """What the demo compares S2D2 with: the same settings without speculation, and one token at a time."""
    return {
        "plain diffusion": (generate_fast, plain(options)),
        "block size one (AR)": (generate_fast, one_token(plain(options))),
    }


def _script(title: str, generate, options: type, presets: dict, compared, **more) -> Script:
    return Script(
        description=__doc__,
        folder=Path(__file__).parent,
        model_class=Fast_dLLM_QwenForCausalLM,
        options=options,
        presets=presets,
        shipped="tiny",
        title=f"Fast-dLLM v2, {title}",
        generate=generate,
        rivals=compared,
        default_prompt=DEFAULT_PROMPT,
        **more,
    )


SCRIPTS = {
    "fast": _script("blocks and small blocks", generate_fast, StandardOptions, PLAIN_PRESETS, plain_rivals),
    "ssd": _script("S2D2, one policy", generate_ssd, Options, SSD_PRESETS, rivals, check=only_span_length),
    "ssd_policy": _script("S2D2", generate_ssd_policy, Options, PRESETS, rivals),
}


def run(argv: Sequence[str] | None = None) -> None:
    """Take ``--generate_fn`` off the command line and run the script it names (default: fast)."""
    script, rest = choose_script(SCRIPTS, argv, "generate_fn", "fast")
    script.run(rest)


def main(argv: Sequence[str] | None = None) -> None:
    """Run; bad input is one line on standard error and exit code 2."""
    run_main(lambda: run(argv))


if __name__ == "__main__":
    main()
