"""One model spread over several processes: each holds a slice of every large weight and they add up their shares.

Attention heads (by key-value group) and the inner features of the MLP are cut between the processes; the projections that close the two
halves of a layer see only this process's share of their input, so each is followed by one all-reduce. The head is cut by vocabulary, with
one all-gather of the logits. Embedding and norms are whole everywhere.

    group = join(World.from_environment(tensor=2), device)               # under torchrun --nproc_per_node=2
    model = shard(SDARForCausalLM, "JetLM/SDAR-8B-Chat", group)          # decodes like any other model

Nobody needs to be told what was decided: every logit is computed by one process and copied to the others, so all have the same bits,
and decoding does the same with them everywhere. Against one process, sums are merely added up in another order.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import UserError
from shared.network.loading import CheckpointModel, network_bytes, on_meta, read_state_dict, resolve_dtype
from shared.network.memory import check_room
from shared.scripts.distributed import World

_BY_OUTPUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
_BY_INPUT = ("o_proj", "down_proj")
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name up to torch 2.12
_CUT = ("num_key_value_heads", "num_attention_heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True)
class Group:
    """The processes that hold one model: this one is ``rank`` of ``size``, on ``device``; ``handle`` is torch's process group."""

    rank: int
    size: int
    device: torch.device
    handle: dist.ProcessGroup | None = None

    def part(self, length: int) -> slice:
        """This process's share of ``length`` rows or columns."""
        share = length // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def sum(self, x: Tensor) -> Tensor:
        """``x``, added up over the group in place."""
        dist.all_reduce(x, group=self.handle)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """``x [...]`` of every process, ``[size, ...]``."""
        parts = x.new_empty(self.size * x.numel())
        _all_gather(parts, x.reshape(-1), group=self.handle)
        return parts.view(self.size, *x.shape)

    def agree(self, x: Tensor) -> bool:
        """Has ``x`` the same bits in every process?"""
        parts = self.gather(x.reshape(-1).view(torch.uint8))
        return bool((parts == parts[0]).all())


def join(world: World, device: torch.device | str, patience: timedelta = timedelta(minutes=30)) -> Group:
    """Meet the processes this one shares a model with (all processes of ``world`` must call it): gloo on CPUs, NCCL on GPUs.

    ``patience``: how long one process waits for another inside a forward before it gives up.
    """
    device = torch.device(device)
    if device.type == "cuda":
        if device.index != world.local:
            raise UserError(
                f"tensor_parallel {world.tensor}: process {world.rank} would run on {device}. Allowed: a GPU of its own "
                f"for each process of a machine (it has {torch.cuda.device_count()}), with --device auto"
            )
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=7))
    for first in range(0, world.size, world.tensor):
        # Every process has to take part in making every group.
        handle = dist.new_group(range(first, first + world.tensor), timeout=patience)
        if first == world.replica * world.tensor:
            mine = handle
    return Group(world.rank % world.tensor, world.tensor, device, mine)


class RowParallel(nn.Module):
    """``sum_r x_r W_r^T + bias``: a linear layer whose input features are spread over the group."""

    def __init__(self, linear: nn.Linear, group: Group):
        super().__init__()
        self.linear, self.group = linear, group

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in / size]`` -> ``[..., out]``."""
        y = self.group.sum(F.linear(x, self.linear.weight))
        return y if self.linear.bias is None else y + self.linear.bias


class VocabularyParallel(nn.Module):
    """The head, each process with its share of the vocabulary; logits are gathered, so all processes have the same bits."""

    def __init__(self, linear: nn.Linear, group: Group):
        super().__init__()
        self.linear, self.group = linear, group

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., hidden]`` -> ``[..., V]``."""
        part = self.linear(x)
        if part.numel() == 0:
            return part.new_empty(*x.shape[:-1], self.group.size * part.shape[-1])
        return self.group.gather(part).movedim(0, -2).flatten(-2)


def check_divides(config, size: int) -> None:
    """Raise `UserError` if ``size`` processes cannot share a model of this config evenly."""
    for field in _CUT:
        if getattr(config, field) % size:
            common = math.gcd(*(getattr(config, name) for name in _CUT))
            allowed = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise UserError(
                f"tensor_parallel {size} does not divide {field} {getattr(config, field)} of this model. Allowed: {allowed}"
            )


def skeleton(model_class: type[CheckpointModel], config, group: Group) -> CheckpointModel:
    """The model with this process's shapes and no weights (on ``meta``), still under the checkpoint's names.

    Its config counts this process's heads, so ``new_cache`` allocates those alone; ``vocab_size`` stays the whole one.
    """
    check_divides(config, group.size)
    config = copy.deepcopy(config)
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        setattr(config, field, getattr(config, field) // group.size)
    with torch.device("meta"):
        model = model_class(config)
        model.lm_head = nn.Linear(config.hidden_size, config.vocab_size // group.size, bias=False)
    return model


def connect(model: CheckpointModel, group: Group) -> CheckpointModel:
    """Make the shares of a loaded `skeleton` add up. ``model.group`` tells that it is only a part."""
    wrappers = {"lm_head": VocabularyParallel} | dict.fromkeys(_BY_INPUT, RowParallel)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in wrappers:
                # A wrapper has no ``weight``: code that would use the weight and forget the others fails at once.
                setattr(module, name, wrappers[name](child, group))
    model.group = group
    return model.eval().requires_grad_(False)


def cut(key: str, weight, group: Group) -> Tensor:
    """This process's part of a checkpoint tensor; ``weight`` is a tensor, or a safetensors slice of which no more is read."""
    *_, layer, kind = key.split(".")
    shape = weight.shape if isinstance(weight, Tensor) else weight.get_shape()
    if layer in _BY_OUTPUT:
        return weight[group.part(shape[0])]
    if layer in _BY_INPUT and kind == "weight":
        return weight[:, group.part(shape[1])].contiguous()
    return weight[:]


def shard(
    model_class: type[CheckpointModel], path_or_id: str | Path, group: Group, *, dtype: torch.dtype | str = "auto"
) -> CheckpointModel:
    """`CheckpointModel.from_pretrained`, of which this process reads and keeps its part, on ``group.device``."""
    folder, config = model_class.read_config(path_or_id)
    model = skeleton(model_class, config, group)
    expected = {key: tensor.shape for key, tensor in on_meta(model_class, config, str(folder)).state_dict().items()}
    dtype = resolve_dtype(dtype, getattr(config, "torch_dtype", None), group.device)
    needed = network_bytes(copy.deepcopy(model).to(dtype))
    check_room(f"{folder}: this process's part of the network", needed, group.device, "more processes, another dtype")
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    expected = {key: shape for key, shape in expected.items() if key not in tied}
    state = read_state_dict(
        folder,
        expected,
        dtype=dtype,
        device=group.device,
        ignored=tied,
        part=lambda key, weight: cut(key, weight, group),
        rename=model_class.checkpoint_key,
    )
    if tied:
        state["lm_head.weight"] = cut("lm_head.weight", state["model.embed_tokens.weight"], group)
    model.load_state_dict(state, assign=True)
    model.folder = folder
    return connect(model, group)


def load(
    model_class: type[CheckpointModel],
    path_or_id: str | Path,
    world: World,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
) -> CheckpointModel:
    """The whole model, or this process's part of it where ``world`` spreads a model over several processes."""
    if world.tensor == 1:
        return model_class.from_pretrained(path_or_id, dtype=dtype, device=device)
    # Refused before processes meet, so that the message is all there is to see.
    if not model_class.divides:
        raise UserError(
            f"tensor_parallel is {world.tensor}. Allowed: 1, {model_class.__name__} is not cut over processes"
        )
    check_divides(model_class.read_config(path_or_id)[1], world.tensor)
    return shard(model_class, path_or_id, join(world, device), dtype=dtype)
