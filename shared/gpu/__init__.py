"""Forwards on a GPU: kernels, the fast forward, CUDA graphs of forwards and of the work between them, the engine."""
