"""Muon for the matrices of the layers, AdamW for everything else (Jordan et al. 2024)."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

MUON_LR = 0.02
ADAM_LR = 3e-3
QK_DECAY = 0.5


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrix to each of ``matrices [K, R, C]``, R <= C, roughly: singular values near one.

    Five steps of the quintic Newton-Schulz iteration with Muon's coefficients, in bfloat16 on a GPU.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised. Parameters of one shape are stacked and updated together.

    A parameter of three dimensions is a stack of matrices (the experts of a layer), each orthogonalised alone. Singular values of an update are near
    ``lr``, so ``decay`` keeps those of a weight below about ``1 / decay``.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float = MUON_LR, momentum: float = 0.95, decay: float = 0.0):
        shapes = defaultdict(list)
        for parameter in parameters:
            shapes[tuple(parameter.shape)].append(parameter)
        groups = [{"params": group} for group in shapes.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            parameters, momentum = group["params"], group["momentum"]
            gradients = torch.stack([p.grad for p in parameters])
            state = self.state[parameters[0]]
            if not state:
                state["momentum"] = torch.zeros_like(gradients)
            average = state["momentum"].lerp_(gradients, 1 - momentum)
            update = gradients.lerp(average, momentum)
            rows, columns = update.shape[-2:]
            flat = update.flatten(0, -3)
            flat = orthogonalise(flat) if rows <= columns else orthogonalise(flat.mT).mT
            update = flat.view_as(update)
            scale = group["lr"] * max(1.0, rows / columns) ** 0.5
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["decay"])
            torch._foreach_add_(parameters, list(update.unbind()), alpha=-scale)


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon over the matrices of the layers, AdamW over embedding, head, norms and routers.

    Without a norm of their own, queries and keys grow until attention is hard and learns no more; their projections are decayed instead.
    """
    matrices = {
        name: p
        for name, p in model.named_parameters()
        if ".layers." in name and p.ndim >= 2 and not name.endswith(".mlp.gate.weight")
    }
    unnormed = [p for name, p in matrices.items() if name.endswith((".q_proj.weight", ".k_proj.weight"))]
    if any(name.endswith(".q_norm.weight") for name, _ in model.named_parameters()):
        unnormed = []
    chosen, decayed = {id(p) for p in matrices.values()}, {id(p) for p in unnormed}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=rest[0].is_cuda)
    others = [p for p in matrices.values() if id(p) not in decayed]
    return [Muon(others), *([Muon(unnormed, decay=QK_DECAY)] if unnormed else []), adam]
