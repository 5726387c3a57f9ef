"""What every family has in common: functions from tensors to tensors, and a handful of small objects.

Shape letters used in every docstring of this repository:

    B  batch rows            L  block length          H     attention heads
    b  rows of one step      P  prompt length         H_kv  key-value heads
    T  tokens of a forward   N  generated tokens      D     head dimension
    V  vocabulary            M  verifier queries      S     cache slots in reach
                             W  local slots

Booleans say what True means: ``masked [B, L]`` is True where a position is still a mask token,
``allowed [T, S]`` is True where a query may attend to a key.
"""
