"""The same in the older form: tokens in, tokens out."""


def run_step(current_tokens, drafter, verifier, step_idx, total_steps, **kw):
    gen_length, mask_id = int(kw["gen_length"]), int(kw.get("mask_id", 126336))
    out = verifier.generate(input_toks={"input_ids": current_tokens}, **kw)
    logits = out["logits"] if isinstance(out, dict) else out
    region = current_tokens[:, -gen_length:]
    confidence, tokens = logits[:, -gen_length:].max(dim=-1)
    confidence = confidence.masked_fill(region != mask_id, float("-inf"))
    _, chosen = confidence.topk(gen_length // total_steps, dim=-1)
    next_tokens = current_tokens.clone()
    next_tokens[:, -gen_length:] = region.scatter(1, chosen, tokens.gather(1, chosen))
    return {"next_tokens": next_tokens, "metrics": {"drafter_nfe": 0, "verifier_nfe": 1}}
