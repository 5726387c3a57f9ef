"""Verification algorithms: step functions in the published form, ``run_step(drafter, verifier, prompts, step_idx, total_steps, algo_state, ...)``."""
