"""What every family has in common: functions from tensors to tensors, and a handful of small objects.

Five rooms, each of which imports only those below it and the modules beside this file:

    scripts    flags, prompt files, results on disk, torchrun: the edge
    decode     canvas, cursor, lanes, the leaves every loop calls, the plain definitions
    policy     proposals, unmasking, routing, acceptance estimators, accept rules, sampling, uniforms
    gpu        kernels, the fast forward, CUDA graphs of forwards and of what lies between them, the engine
    network    the decoder networks, attention, masks, rotary, cache, checkpoints, exact scores

Shape letters used in every docstring of this repository:

    B  batch rows            L  block length          H     attention heads
    b  rows of one step      P  prompt length         H_kv  key-value heads
    T  tokens of a forward   N  generated tokens      D     head dimension
    V  vocabulary            M  verifier queries      S     cache slots in reach
                             W  local slots

Booleans say what True means: ``masked [B, L]`` is True where a position is still a mask token,
``allowed [T, S]`` is True where a query may attend to a key.
"""
