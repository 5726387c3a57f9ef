"""The decoders ``fast`` and ``ssd`` of Fast-dLLM v2 as functions."""

from __future__ import annotations

from fast_dllm_v2 import decoding
from fast_dllm_v2.options import Options, StandardOptions
from shared.decode.calls import split_call
from shared.errors import UserError
from shared.output import Output


def generate_fast(model, input_ids, options: StandardOptions | None = None, *, uniforms=None, **flat) -> Output:
    """Decode ``input_ids`` by blocks, small blocks and a confidence threshold (Fast-dLLM v2).

    ``options`` is a `StandardOptions`; flat keywords change single fields (``confidence_threshold=0.9``) and are checked. Fields of
    `shared.decode.calls.Call` (``seed``, ``batch_size``, ``tokenizer``, ...) are keywords too.
    """
    return decoding.generate(StandardOptions, model, input_ids, options, uniforms, flat)


def generate_ssd(model, input_ids, options: Options | None = None, *, uniforms=None, **flat) -> Output:
    """Decode by self-speculation, verifying spans from ``min_ssd_span_length`` on: ``generate_ssd_policy`` with that one policy."""
    options, call = split_call(Options, options, {**flat, "uniforms": uniforms})
    only_span_length(options)
    return decoding.decode(model, input_ids, options, call)


def only_span_length(options: Options) -> None:
    """Raise `UserError` unless the policy is the one ``ssd`` has."""
    policy = options.routing.do_verify_policy
    if policy != "mask_span_length":
        raise UserError(
            f"do_verify_policy is {policy!r}. Allowed with ssd: mask_span_length; ssd_policy has the others"
        )
