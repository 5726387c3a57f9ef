"""Decisions of a step, tensors in and tensors out: proposals, unmasking, routing, acceptance, sampling, uniforms."""
