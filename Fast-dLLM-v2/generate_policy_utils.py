"""The decoder ``ssd_policy`` of Fast-dLLM v2 as a function."""

from __future__ import annotations

from fast_dllm_v2 import decoding
from fast_dllm_v2.options import Options
from shared.output import Output


def generate_ssd_policy(model, input_ids, options: Options | None = None, *, uniforms=None, **flat) -> Output:
    """Decode ``input_ids`` by self-speculation with a routing policy (S2D2).

    ``options`` is an `Options`; flat keywords change single fields (``do_verify_policy="always"``) and are checked. Fields of
    `shared.decode.calls.Call` (``seed``, ``batch_size``, ``tokenizer``, ...) are keywords too.
    """
    return decoding.generate(Options, model, input_ids, options, uniforms, flat)
