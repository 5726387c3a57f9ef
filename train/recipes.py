"""What is trained for each family: sizes, configuration, and the folder that comes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from fast_dllm_v2 import Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM
from sdar import SDARConfig, SDARForCausalLM
from shared.errors import UserError, unknown_name
from shared.loading import CheckpointModel
from train.attention import fused_attention
from train.block_diffusion import BlockDiffusion
from train.data import batches
from train.loop import Objective, Outcome, fit
from train.shifted_diffusion import ShiftedDiffusion
from train.tasks import WEIGHTS
from train.tokenizer import TURN_END, build_tokenizer, save_tokenizer

# hidden, feed-forward, layers, heads, key-value heads. "tiny" is shipped; "smoke" only proves that the code runs.
SIZES = {
    "smoke": (32, 64, 2, 2, 1),
    "small": (128, 352, 4, 4, 2),
    "tiny": (192, 512, 5, 6, 3),
    "medium": (256, 704, 8, 8, 4),
}
HEAD_DIM = 32
POSITIONS = 2048
BLOCK_SIZE = 16
FAST_BLOCK_SIZE = 32


@dataclass(frozen=True, slots=True)
class Recipe:
    """The choices of one run. ``seconds`` and ``steps``: whichever is reached first ends it."""

    seconds: float | None = None
    steps: int | None = None
    size: str = "tiny"
    batch_tokens: int = 24_576
    seed: int = 0
    workers: int = 0
    compile: bool = False

    def __post_init__(self):
        if self.size not in SIZES:
            raise unknown_name("size", self.size, SIZES)
        if self.seconds is None and self.steps is None:
            raise UserError("give --seconds or --steps")
        for name, least in (("seconds", 0), ("steps", 0), ("batch_tokens", 255)):
            value = getattr(self, name)
            if value is not None and value <= least:
                raise UserError(f"{name} {value} is too small. Allowed: more than {least}")
        if self.workers < 0:
            raise UserError(f"workers {self.workers} is negative. Allowed: 0 or more")


def network(size: str, tokenizer: PreTrainedTokenizerFast) -> dict:
    """Configuration that every family has, at a few million parameters."""
    hidden, feed_forward, layers, heads, kv_heads = SIZES[size]
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": POSITIONS,
        "rope_theta": 1e4,
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def initialise(model: CheckpointModel, seed: int) -> None:
    """Matrices from a normal of deviation `initializer_range`, biases at zero, norms at one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, model.config.initializer_range, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()


def save(model: CheckpointModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The checkpoint as the family's ``from_pretrained`` and `AutoTokenizer` read it, weights in bfloat16."""
    model.save_pretrained(folder, dtype=torch.bfloat16)
    save_tokenizer(tokenizer, folder)
    stop = [tokenizer.convert_tokens_to_ids(TURN_END), tokenizer.eos_token_id]
    generation = {"eos_token_id": stop, "pad_token_id": tokenizer.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _train(
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    new_model: Callable[[PreTrainedTokenizerFast], CheckpointModel],
    new_objective: Callable[..., Objective],
) -> Outcome:
    tokenizer = build_tokenizer()
    model = new_model(tokenizer)
    initialise(model, recipe.seed)
    model = model.to(device)
    if recipe.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    stream = batches(tokenizer, WEIGHTS, batch_tokens=recipe.batch_tokens, seed=recipe.seed, workers=recipe.workers)
    objective = new_objective(tokenizer.mask_token_id, recipe.seed, device)
    with fused_attention(model):
        outcome = fit(model, objective, stream, seconds=recipe.seconds, steps=recipe.steps)
    save(model, tokenizer, folder)
    return outcome


def train_sdar(recipe: Recipe, folder: Path, device: torch.device) -> Outcome:
    """Train an SDAR checkpoint by block diffusion and write it to ``folder``."""

    def new_model(tokenizer: PreTrainedTokenizerFast) -> SDARForCausalLM:
        shape = network(recipe.size, tokenizer)
        return SDARForCausalLM(SDARConfig(**shape, block_size=BLOCK_SIZE, architectures=["SDARForCausalLM"]))

    return _train(recipe, folder, device, new_model, BlockDiffusion)


def train_fast_dllm_v2(recipe: Recipe, folder: Path, device: torch.device) -> Outcome:
    """Train a Fast-dLLM v2 checkpoint by shifted block diffusion and write it to ``folder``."""

    def new_model(tokenizer: PreTrainedTokenizerFast) -> Fast_dLLM_QwenForCausalLM:
        shape = network(recipe.size, tokenizer)
        name = "Fast_dLLM_QwenForCausalLM"
        return Fast_dLLM_QwenForCausalLM(Fast_dLLM_QwenConfig(**shape, bd_size=FAST_BLOCK_SIZE, architectures=[name]))

    return _train(recipe, folder, device, new_model, ShiftedDiffusion)


FAMILIES = {"SDAR": train_sdar, "Fast-dLLM-v2": train_fast_dllm_v2}
