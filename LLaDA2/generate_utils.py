"""The decoders ``nocache`` and ``cached`` of LLaDA2 as functions."""

from __future__ import annotations

from llada2 import decoding
from llada2.options import NoCacheOptions, StandardOptions
from shared.output import Output


def generate_nocache(model, input_ids, options: NoCacheOptions | None = None, *, uniforms=None, **flat) -> Output:
    """Decode ``input_ids`` by a confidence threshold with token editing, every forward over everything so far (LLaDA2.1).

    ``options`` is a `NoCacheOptions`; flat keywords change single fields (``editing_threshold=0.9``) and are checked. Fields of
    `shared.decode.calls.Call` (``seed``, ``batch_size``, ``tokenizer``, ...) are keywords too.
    """
    return decoding.generate(NoCacheOptions, model, input_ids, options, uniforms, flat)


def generate_cached(model, input_ids, options: StandardOptions | None = None, *, uniforms=None, **flat) -> Output:
    """The same on a cache of finished blocks: the same text for a fraction of the work. ``options`` is a `StandardOptions`."""
    return decoding.generate(StandardOptions, model, input_ids, options, uniforms, flat)
