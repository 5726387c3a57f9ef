"""What is trained for each family: sizes, configuration, and the folder that comes out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from fast_dllm_v2 import Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM
from llada2 import LLaDA2MoeConfig, LLaDA2MoeModelLM
from sdar import SDARConfig, SDARForCausalLM
from shared.errors import UserError, unknown_name
from shared.network.loading import CheckpointModel
from train.attention import fused_attention
from train.balance import LoadBalance
from train.block_diffusion import BlockDiffusion
from train.data import Batch, batches
from train.editing import EditedBlockDiffusion
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
# The same for LLaDA2, then experts and the width of one. The first layer is dense; two experts a token, half of four groups, one shared expert.
EXPERT_SIZES = {
    "smoke": (32, 64, 2, 2, 1, 8, 16),
    "small": (96, 256, 4, 3, 1, 8, 48),
    "tiny": (160, 400, 5, 6, 3, 8, 80),
    "medium": (256, 704, 8, 8, 4, 16, 96),
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


def network(sizes: tuple[int, ...], tokenizer: PreTrainedTokenizerFast) -> dict:
    """Configuration that every family has, at a few million parameters."""
    hidden, feed_forward, layers, heads, kv_heads = sizes
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": POSITIONS,
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def initialise(model: CheckpointModel, seed: int) -> CheckpointModel:
    """Matrices from a normal of deviation `initializer_range`, biases at zero, norms at one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, model.config.initializer_range, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
    return model


def save(model: CheckpointModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The checkpoint as the family's ``from_pretrained`` and `AutoTokenizer` read it, weights in bfloat16."""
    model.save_pretrained(folder, dtype=torch.bfloat16)
    save_tokenizer(tokenizer, folder)
    stop = [tokenizer.convert_tokens_to_ids(TURN_END), tokenizer.eos_token_id]
    generation = {"eos_token_id": stop, "pad_token_id": tokenizer.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def train(
    model: CheckpointModel, objective: Objective, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, folder: Path
) -> Outcome:
    """Train ``model`` and write it to ``folder``."""
    if recipe.compile:
        # A graph for each width of batch, kind of layer, and whether gradients are wanted.
        torch._dynamo.config.recompile_limit = 64
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    stream = batches(tokenizer, WEIGHTS, batch_tokens=recipe.batch_tokens, seed=recipe.seed, workers=recipe.workers)
    with fused_attention(model):
        outcome = fit(model, objective, stream, seconds=recipe.seconds, steps=recipe.steps)
    save(model, tokenizer, folder)
    return outcome


def train_sdar(recipe: Recipe, folder: Path, device: torch.device) -> Outcome:
    """An SDAR checkpoint, by block diffusion."""
    tokenizer = build_tokenizer()
    config = SDARConfig(
        **network(SIZES[recipe.size], tokenizer),
        rope_theta=1e4,
        block_size=BLOCK_SIZE,
        architectures=["SDARForCausalLM"],
    )
    model = initialise(SDARForCausalLM(config), recipe.seed).to(device)
    return train(model, BlockDiffusion(tokenizer.mask_token_id, recipe.seed, device), tokenizer, recipe, folder)


def train_fast_dllm_v2(recipe: Recipe, folder: Path, device: torch.device) -> Outcome:
    """A Fast-dLLM v2 checkpoint, by shifted block diffusion."""
    tokenizer = build_tokenizer()
    config = Fast_dLLM_QwenConfig(
        **network(SIZES[recipe.size], tokenizer),
        rope_theta=1e4,
        bd_size=FAST_BLOCK_SIZE,
        architectures=["Fast_dLLM_QwenForCausalLM"],
    )
    model = initialise(Fast_dLLM_QwenForCausalLM(config), recipe.seed).to(device)
    return train(model, ShiftedDiffusion(tokenizer.mask_token_id, recipe.seed, device), tokenizer, recipe, folder)


def llada2_config(size: str, tokenizer: PreTrainedTokenizerFast) -> LLaDA2MoeConfig:
    """The LLaDA2 architecture at a few million parameters."""
    *sizes, experts, width = EXPERT_SIZES[size]
    return LLaDA2MoeConfig(
        **network(sizes, tokenizer),
        use_bias=False,
        rms_norm_eps=1e-6,
        num_experts=experts,
        num_experts_per_tok=2,
        num_shared_experts=1,
        moe_intermediate_size=width,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.0,
        block_size=BLOCK_SIZE,
        architectures=["LLaDA2MoeModelLM"],
    )


def train_llada2(recipe: Recipe, folder: Path, device: torch.device) -> Outcome:
    """A LLaDA2 checkpoint, by block diffusion with token editing; the load of its experts is kept even."""
    tokenizer = build_tokenizer()
    model = initialise(LLaDA2MoeModelLM(llada2_config(recipe.size, tokenizer)), recipe.seed).to(device)
    diffusion, balance = EditedBlockDiffusion(tokenizer.mask_token_id, recipe.seed, device), LoadBalance(model)

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        balance.step()
        return diffusion(model, batch)

    return train(model, objective, tokenizer, recipe, folder)


FAMILIES = {"SDAR": train_sdar, "LLaDA2": train_llada2, "Fast-dLLM-v2": train_fast_dllm_v2}
