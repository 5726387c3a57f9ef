"""The fast forward of Fast-dLLM v2 on a GPU: the network of `modeling_fast` as `shared.gpu.fast` runs it."""

from __future__ import annotations

from shared.gpu.fast import FastForward


class FastFastdLLM(FastForward):
    """See `FastForward`: nothing differs, biases included."""

    family = "Fast-dLLM v2"
