"""The decoders ``d2f`` and ``ssd`` as functions, under their published names."""

from __future__ import annotations

from d2f import decoding
from d2f.options import Options, StandardOptions
from shared.output import Output


def generate_block_single(model, input_ids, options: StandardOptions | None = None, *, uniforms=None, **flat) -> Output:
    """Decode ``input_ids`` with several blocks in flight (Wang et al. 2025, D2F, algorithm of section 3.3).

    ``options`` is a `StandardOptions`; flat keywords change single fields (``block_add_threshold=0.1``) and are checked. Fields of
    `shared.decode.calls.Call` (``seed``, ``batch_size``, ``tokenizer``, ...) are keywords too.
    """
    return decoding.generate(StandardOptions, model, input_ids, options, uniforms, flat)


def generate_block_speculative(model, input_ids, options: Options | None = None, *, uniforms=None, **flat) -> Output:
    """The same with S2D2 on top: the model, decoding token by token, verifies the first masked span of its own drafts. ``options`` is an `Options`."""
    return decoding.generate(Options, model, input_ids, options, uniforms, flat)
