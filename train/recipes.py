"""How a checkpoint is trained: sizes, configuration, and the folder that comes out. What is trained is said by its family (`shared.family.Training`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from shared.errors import UserError, unknown_name
from shared.family import Family, Training, imported
from shared.network.loading import CheckpointModel
from train.attention import fused_attention
from train.data import batches
from train.loop import Outcome, fit
from train.tasks import WEIGHTS
from train.tokenizer import TURN_END, build_tokenizer, save_tokenizer

HEAD_DIM = 32
POSITIONS = 2048


def _size(hidden: int, feed_forward: int, layers: int, heads: int, kv_heads: int) -> dict:
    """A size as configuration."""
    return {
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


# "tiny" is shipped; "smoke" only proves that the code runs.
SIZES = {
    "smoke": _size(32, 64, 2, 2, 1),
    "small": _size(128, 352, 4, 4, 2),
    "tiny": _size(192, 512, 5, 6, 3),
    "medium": _size(256, 704, 8, 8, 4),
}


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
        if self.seconds is None and self.steps is None:
            raise UserError("give --seconds or --steps")
        for name, least in (("seconds", 0), ("steps", 0), ("batch_tokens", 255)):
            value = getattr(self, name)
            if value is not None and value <= least:
                raise UserError(f"{name} {value} is too small. Allowed: more than {least}")
        if self.workers < 0:
            raise UserError(f"workers {self.workers} is negative. Allowed: 0 or more")


def configuration(training: Training, size: str, tokenizer: PreTrainedTokenizerFast) -> dict:
    """What a network's configuration is made with: the tokenizer's ids, the size, and what the family says."""
    sizes = training.sizes or SIZES
    if size not in sizes:
        raise unknown_name("size", size, sizes)
    common = {
        "vocab_size": len(tokenizer),
        "head_dim": HEAD_DIM,
        "max_position_embeddings": POSITIONS,
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {**common, **sizes[size], **training.config}


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
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def train(family: Family, role: str, recipe: Recipe, folder: Path, device: torch.device) -> Outcome:
    """Train the network of a role and write it to ``folder``."""
    training, kind = family.trains[role], family.networks[role].model_class
    tokenizer = build_tokenizer()
    config = kind.config_class(**configuration(training, recipe.size, tokenizer), architectures=[kind.__name__])
    model = initialise(kind(config), recipe.seed).to(device)
    objective = imported(training.objective)(model, tokenizer.mask_token_id, recipe.seed)
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
