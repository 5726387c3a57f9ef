"""DualDiffusion's evaluation suite: accuracy, diversity, speed, robustness and perplexity of a drafter with a verifier, beside each of the two alone.

``python -m mdlm_dvd.src.evals.suite --config FILE``
"""
