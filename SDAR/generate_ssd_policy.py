"""S2D2 with SDAR: the model drafts a block by diffusion and verifies it as its own block-size-one model.

python generate_ssd_policy.py                             # the shipped checkpoint, a built-in problem
python generate_ssd_policy.py --forward_stats --draft_ver --cache_ver
python generate_ssd_policy.py --model JetLM/SDAR-8B-Chat --preset paper-b
"""

from __future__ import annotations

from sdar import decoding
from sdar.options import Options
from shared.output import Output


def block_diffusion_generate(model, input_ids, options: Options | None = None, *, uniforms=None, **flat) -> Output:
    """Decode ``input_ids`` by self-speculation (S2D2).

    ``options`` is an `Options`; flat keywords change single fields (``do_verify_policy="always"``) and are checked. Keywords of
    `decoding.decode` (``seed``, ``batch_size``, ``tokenizer``, ``attention_mask``, ``on_block``, ``on_finish``) pass through.
    """
    return decoding.generate(Options, model, input_ids, options, uniforms, flat)
