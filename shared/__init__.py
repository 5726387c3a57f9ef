"""What every family has in common: functions from tensors to tensors, and a handful of small objects.

Shape letters used in every docstring of this repository:

    B  batch rows            L  block length          H     attention heads
    T  tokens of a forward   S  cache slots / span    H_kv  key-value heads
    V  vocabulary            N  generated tokens      D     head dimension

Booleans say what True means: ``masked [B, L]`` is True where a position is still a mask token,
``allowed [T, S]`` is True where a query may attend to a key.
"""
