"""Which family is measured, and random weights in the shape of a released checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shared.errors import UserError, unknown_name
from shared.family import FAMILIES, Family, Network, default_family, family_named
from shared.network.loading import CheckpointModel, network_bytes, on_meta
from shared.network.memory import check_room
from shared.scripts.models import family_of_checkpoint


def shapes() -> dict[str, str]:
    """The family of every named shape."""
    return {shape: name for name, family in FAMILIES.items() for shape in family.shapes}


def family_of(family: str | None, shape: str | None, model: str | None) -> Family:
    """The family of ``shape`` or of the checkpoint ``model``, else ``family``, else the default; `UserError` if they
    differ."""
    if shape is not None and shape not in shapes():
        raise unknown_name("shape", shape, sorted(shapes()))
    found = shapes()[shape] if shape else None
    if model is not None:
        found = family_of_checkpoint(model)
    if family and found and family != found:
        raise UserError(f"family is {family!r}. Allowed with this shape or model: {found}")
    return family_named(found or family or default_family())


def random_models(family: Family, shape: str, device: torch.device, dtype: torch.dtype) -> dict[str, CheckpointModel]:
    """Random weights of a named shape for every role, made on the device."""
    return {
        role: random_model(network_class(family.networks[role], config), config, device, dtype)
        for role, config in family.shapes[shape].items()
    }


def network_class(network: Network, config: Mapping) -> type[CheckpointModel]:
    """The class of a network of this configuration, by its ``model_type`` where it has one."""
    return network.choices[config.get("model_type", network.model_type)].model_class


def random_model(
    kind: type[CheckpointModel], config: Mapping, device: torch.device, dtype: torch.dtype
) -> CheckpointModel:
    """A network of random weights."""
    config = {name: value for name, value in config.items() if name != "model_type"}
    model = on_meta(kind, kind.config_class(**config, max_position_embeddings=32768, eos_token_id=0), "shape").to(dtype)
    check_room("this shape", network_bytes(model), device, "a smaller shape, or another device or dtype")
    model = model.to_empty(device=device).requires_grad_(False).eval()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.fill_(1.0)
        else:
            weight.normal_(std=0.02)
    for buffer in model.buffers():
        buffer.zero_()
    return model
