"""Evaluation: lm-eval's model (`dvd_lm_eval`), DualDiffusion's suite (`suite`).

Unlike the rest of a family these files, and those of ``scripts``, may import `eval`, whose tasks and plots they share.
"""
