"""Small networks and prompts for the tests of this family."""

from __future__ import annotations

import os
import random
from functools import lru_cache
from pathlib import Path

import torch

from shared.network.llada import LLaDAConfig, LLaDAModelLM
from tests.family_checks import HERE

MASK, EOS = 63, 62


def golden() -> Path:
    """Recorded behaviour; ``GOLDEN_DIR`` overrides the parent folder. Missing data is a failure."""
    folder = Path(os.environ.get("GOLDEN_DIR", HERE / "golden")) / "MDLM-DVD"
    if not (folder / "dvd_steps.json").is_file():
        raise FileNotFoundError(f"golden data of MDLM-DVD is missing: {folder}")
    return folder


@lru_cache
def recorded(name: str) -> LLaDAModelLM:
    """A recorded network, by the name of its folder."""
    return LLaDAModelLM.from_pretrained(golden() / name, dtype=torch.float32)


@lru_cache
def network(seed: int = 0, block_size: int | None = None) -> LLaDAModelLM:
    """A random network in float64, so that ties and rounding play no part."""
    more = {} if block_size is None else {"block_size": block_size}
    config = LLaDAConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, mask_token_id=MASK, eos_token_id=EOS, rope_theta=1e4, **more,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LLaDAModelLM(config).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.25)
    return model


def nearly(seed: int, noise: float = 0.02) -> LLaDAModelLM:
    """A network that mostly says what ``network(0)`` says."""
    model, like = network(seed + 100), network(0)
    generator = torch.Generator().manual_seed(seed)
    for mine, theirs in zip(model.parameters(), like.parameters(), strict=True):
        mine.copy_(theirs + noise * torch.randn(theirs.shape, generator=generator, dtype=theirs.dtype))
    return model


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of unequal lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(60) for _ in range(n)] for n in rng.sample(range(1, 30), count)]
