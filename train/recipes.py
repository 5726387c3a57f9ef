"""How a checkpoint or an adapter is trained: sizes, configuration, and the folder that comes out. What is trained is said by its family
(`shared.family.Training`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from shared.errors import UserError, unknown_name
from shared.family import Family, Network, Training, imported
from shared.network.loading import CheckpointModel, load_tokenizer
from shared.scripts.models import network_of
from train import lora
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
    """The choices of one run. ``seconds`` and ``steps``: whichever is reached first ends it. ``start``: a checkpoint to go on from, whose size it then is."""

    seconds: float | None = None
    steps: int | None = None
    size: str = "tiny"
    batch_tokens: int = 24_576
    seed: int = 0
    workers: int = 0
    compile: bool = False
    start: str | None = None

    def __post_init__(self):
        if self.seconds is None and self.steps is None:
            raise UserError("give --seconds or --steps")
        for name, least in (("seconds", 0), ("steps", 0), ("batch_tokens", 255)):
            value = getattr(self, name)
            if value is not None and value <= least:
                raise UserError(f"{name} {value} is too small. Allowed: more than {least}")
        if self.workers < 0:
            raise UserError(f"workers {self.workers} is negative. Allowed: 0 or more")


def size_named(training: Training, name: str) -> Mapping:
    """The configuration of that size."""
    sizes = training.sizes or SIZES
    if name not in sizes:
        raise unknown_name("size", name, sizes)
    return sizes[name]


def configuration(training: Training, size: Mapping, tokenizer: PreTrainedTokenizerFast) -> dict:
    """What a network's configuration is made with: the tokenizer's ids, the size, and what the family says."""
    common = {
        "vocab_size": len(tokenizer),
        "head_dim": HEAD_DIM,
        "max_position_embeddings": POSITIONS,
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {**common, **size, **training.config}


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


def run(
    model: CheckpointModel, training: Training, options: object, tokenizer, mask_id: int, recipe: Recipe, **how
) -> Outcome:
    """Train ``model`` in place. ``how``: as `train.loop.fit` takes it."""
    given = () if options is None else (options,)
    objective = imported(training.objective)(model, mask_id, recipe.seed, *given)
    if recipe.compile:
        # A graph for each width of batch, kind of layer, and whether gradients are wanted.
        torch._dynamo.config.recompile_limit = 64
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    stream = batches(
        tokenizer,
        WEIGHTS,
        batch_tokens=recipe.batch_tokens,
        seed=recipe.seed,
        workers=recipe.workers,
        from_prompt=training.from_prompt,
        most_more=training.more_padding,
    )
    with fused_attention(model):
        return fit(model, objective, stream, seconds=recipe.seconds, steps=recipe.steps, **how)


def train(
    training: Training, network: Network, recipe: Recipe, options: object, folder: Path, device: torch.device
) -> Outcome:
    """Train a network, from scratch or from ``recipe.start``, and write it to ``folder``. ``options`` are of the class that ``training`` names (None: it
    names none)."""
    size = size_named(training, recipe.size)
    kind, tokenizer = network.model_class, build_tokenizer()
    if recipe.start is None:
        config = kind.config_class(
            **configuration(training, size, tokenizer), architectures=[getattr(kind, "architecture", kind.__name__)]
        )
        model = initialise(kind(config), recipe.seed).to(device)
    else:
        model = kind.from_pretrained(recipe.start, dtype=torch.float32, device=device).requires_grad_(True)
    outcome = run(model, training, options, tokenizer, tokenizer.mask_token_id, recipe)
    save(model, tokenizer, folder)
    return outcome


def train_adapter(
    family: Family, role: str, recipe: Recipe, options, base: str, dtype: str, folder: Path, device: torch.device
) -> Outcome:
    """Train an adapter on the network ``base``, a folder or hub id, and write it to ``folder``; ``options`` has a group ``lora``."""
    network = network_of(family.networks[family.networks[role].on], base)
    model = network.model_class.from_pretrained(base, dtype=dtype, device=device)
    tokenizer = load_tokenizer(base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    mask_id, _ = model.special_ids(tokenizer=tokenizer)
    lora.adapt(model, options.lora, recipe.seed)
    how = {"optimizer_list": lora.optimizers(model, options.lora), "clip": options.lora.clip}
    training = family.trains[role].of_type(network.model_type)
    outcome = run(model, training, options, tokenizer, mask_id, recipe, **how)
    lora.save(model, base, folder, options.lora)
    return outcome
