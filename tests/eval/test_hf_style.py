"""Published code on our weights decodes what ours decodes."""

import torch

from eval.hf_style import HFStyle
from sdar import SDARForCausalLM, generate
from tests.eval import published_style
from tests.family_checks import draw_prompts, golden_folder


def test_a_published_loop_gives_our_text():
    model = SDARForCausalLM.from_pretrained(golden_folder("SDAR") / "model", dtype=torch.float64)
    for prompt in draw_prompts(4, seed=3):
        theirs = published_style.generate(HFStyle(model), torch.tensor([prompt]))[0, len(prompt) :].tolist()
        ours = generate.block_diffusion_generate(
            model,
            prompt,
            remasking_strategy="low_confidence_static",
            block_length=4,
            max_new_tokens=16,
            stopping_criteria_idx=(),
            round_to_blocks=True,
        )
        assert ours.tokens[0] == theirs
