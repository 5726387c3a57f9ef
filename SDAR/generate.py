"""Plain block diffusion with SDAR. ``python generate.py --help`` lists every flag.

python generate.py                                        # the shipped checkpoint, a built-in problem
python generate.py --model JetLM/SDAR-8B-Chat --prompt "How many dogs ..."
python generate.py --remasking_strategy low_confidence_static --block_length 8
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.errors import end_on_interrupt

    end_on_interrupt()

from pathlib import Path

from sdar import decoding
from sdar.modeling_sdar import SDARForCausalLM
from sdar.options import DEFAULT_PROMPT, PLAIN_PRESETS, StandardOptions
from shared.output import Output
from shared.scripts.cli import Script


def block_diffusion_generate(
    model, input_ids, options: StandardOptions | None = None, *, uniforms=None, **flat
) -> Output:
    """Decode ``input_ids`` block by block, several tokens a step (SDAR, "bd3" on older command lines).

    ``options`` is a `StandardOptions`; flat keywords change single fields (``confidence_threshold=0.9``) and are checked. Fields of
    `shared.decode.calls.Call` (``seed``, ``batch_size``, ``tokenizer``, ...) are keywords too.
    """
    return decoding.generate(StandardOptions, model, input_ids, options, uniforms, flat)


def rivals(options: StandardOptions) -> dict:
    """What the demo compares this run with."""
    return {"block size one (AR)": (block_diffusion_generate, options.replace(block_length=1, denoising_steps=1))}


SCRIPT = Script(
    description=__doc__,
    folder=Path(__file__).parent,
    model_class=SDARForCausalLM,
    options=StandardOptions,
    presets=PLAIN_PRESETS,
    shipped="tiny",
    title="SDAR, plain block diffusion",
    generate=block_diffusion_generate,
    rivals=rivals,
    default_prompt=DEFAULT_PROMPT,
)

if __name__ == "__main__":
    SCRIPT.main()
