"""Plain block diffusion with SDAR. ``python generate.py --help`` lists every flag.

python generate.py                                        # the shipped checkpoint, a built-in problem
python generate.py --model JetLM/SDAR-8B-Chat --prompt "How many dogs ..."
python generate.py --remasking_strategy low_confidence_static --block_length 8
"""

from __future__ import annotations

from sdar import decoding
from sdar.options import StandardOptions
from shared.output import Output


def block_diffusion_generate(model, input_ids, options: StandardOptions | None = None, *, uniforms=None, **flat) -> Output:
    """Decode ``input_ids`` block by block, several tokens a step (SDAR, "bd3" on older command lines).

    ``options`` is a `StandardOptions`; flat keywords change single fields (``confidence_threshold=0.9``) and are checked. Keywords of
    `decoding.decode` (``seed``, ``batch_size``, ``tokenizer``, ``attention_mask``, ``on_block``, ``on_finish``) pass through.
    """
    return decoding.generate(StandardOptions, model, input_ids, options, uniforms, flat)
