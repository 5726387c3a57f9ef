"""S2D2 with SDAR: the model drafts a block by diffusion and verifies it as its own block-size-one model.

python generate_ssd_policy.py                             # the shipped checkpoint, a built-in problem
python generate_ssd_policy.py --forward_stats --draft_ver --cache_ver
python generate_ssd_policy.py --model JetLM/SDAR-8B-Chat --preset paper-b
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.errors import end_on_interrupt

    end_on_interrupt()

from pathlib import Path

from sdar import decoding, generate
from sdar.modeling_sdar import SDARForCausalLM
from sdar.options import DEFAULT_PROMPT, PRESETS, Options, plain
from shared.output import Output
from shared.scripts.cli import Script


def block_diffusion_generate(model, input_ids, options: Options | None = None, *, uniforms=None, **flat) -> Output:
    """Decode ``input_ids`` by self-speculation (S2D2).

    ``options`` is an `Options`; flat keywords change single fields (``do_verify_policy="always"``) and are checked. Fields of
    `shared.decode.calls.Call` (``seed``, ``batch_size``, ``tokenizer``, ...) are keywords too.
    """
    return decoding.generate(Options, model, input_ids, options, uniforms, flat)


def rivals(options: Options) -> dict:
    """What the demo compares this run with: the same settings without speculation, and one token at a time."""
    one = plain(options).replace(block_length=1, denoising_steps=1)
    return {
        "plain diffusion": (generate.block_diffusion_generate, plain(options)),
        "block size one (AR)": (generate.block_diffusion_generate, one),
    }


SCRIPT = Script(
    description=__doc__,
    folder=Path(__file__).parent,
    model_class=SDARForCausalLM,
    options=Options,
    presets=PRESETS,
    shipped="tiny",
    title="SDAR, S2D2",
    generate=block_diffusion_generate,
    rivals=rivals,
    default_prompt=DEFAULT_PROMPT,
)

if __name__ == "__main__":
    SCRIPT.main()
