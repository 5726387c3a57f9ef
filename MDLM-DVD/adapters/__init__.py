"""Adapters: the functions by which the broker loads a model, reads a prompt, and runs one forward."""
