"""A model that is not on the current GPU decodes all the same: kernels and graphs go where its weights are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from shared.decode.run import inference
from shared.family import FAMILIES
from shared.network.loading import load_tokenizer
from shared.scripts.prompts import encode_prompt


def test_a_decode_makes_the_gpu_of_its_model_the_current_one(monkeypatch):
    entered = []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(str(self.device))

        def __exit__(self, *error):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", Guard)
    decode = inference(lambda model, ids, more=0: (entered[-1], torch.is_inference_mode_enabled(), ids + more))
    assert decode(SimpleNamespace(device=torch.device("cuda:1")), 3, more=4) == ("cuda:1", True, 7)
    assert entered == ["cuda:1", "left"]
    decode(SimpleNamespace(device=torch.device("cpu")), 3)
    assert entered == ["cuda:1", "left"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_second_gpu_gives_the_text_of_the_first(name):
    family = FAMILIES[name]
    tokenizer = load_tokenizer(family.tiny)
    prompts = [encode_prompt(tokenizer, {"prompt": f"Count from {k} to {k + 9}."}) for k in range(3)]
    texts = []
    for device in ("cuda:0", "cuda:1"):
        model = family.networks[family.first].model_class.from_pretrained(
            family.tiny, device=device, dtype=torch.float32
        )
        decoders = [decoder.generate for decoder in family.decoders.values()]
        texts += [decode(model, prompts, max_new_tokens=48).tokens for decode in decoders for _ in range(2)]
    half = len(texts) // 2
    assert texts[:half] == texts[half:]
    assert torch.cuda.current_device() == 0
