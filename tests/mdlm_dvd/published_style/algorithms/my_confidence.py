"""The verifier alone, its surest tokens first, written with the published helpers."""

import torch
from algorithms._common import decode_results, initialize_content, sample_topk_confident, step_generate


def run_step(drafter, verifier, prompts, step_idx, total_steps, algo_state, **kwargs):
    gen_length = int(kwargs.get("gen_length"))
    mask_id = int(kwargs.get("mask_id", 126336))
    passed = {k: v for k, v in kwargs.items() if k not in ["gen_length", "mask_id"]}

    if step_idx == 0:
        content, attn, prompt_len, logits = initialize_content(verifier, prompts, gen_length, mask_id, **passed)
    else:
        content, attn, prompt_len = algo_state["content"], algo_state["attn"], algo_state["prompt_len"]
        logits = step_generate(verifier, content, attn, prompt_len, gen_length, mask_id)

    region = sample_topk_confident(logits, content[:, prompt_len:], mask_id, k=gen_length // total_steps)
    content = torch.cat([content[:, :prompt_len], region], dim=1)
    result = {
        "algo_state": {"content": content, "attn": attn, "prompt_len": prompt_len},
        "metrics": {"drafter_nfe": 0, "verifier_nfe": 1},
    }
    if step_idx == total_steps - 1:
        result["results"] = decode_results(verifier, content, prompts, prompt_len)
    return result
