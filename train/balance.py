"""An even load on the experts of a layer without a loss of its own (Wang et al. 2024, auxiliary-loss-free load balancing)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

RATE = 1e-3


class LoadBalance:
    """After each step, experts with less than their share gain `RATE` of ``expert_bias``, those with more lose it."""

    def __init__(self, model: nn.Module):
        self.routers = [module for module in model.modules() if hasattr(module, "expert_bias")]
        self.loads = [torch.zeros_like(router.expert_bias) for router in self.routers]
        for router, load in zip(self.routers, self.loads, strict=True):
            router.register_forward_hook(lambda module, args, out, load=load: self._count(load, out[0]))

    @staticmethod
    def _count(load: Tensor, experts: Tensor) -> None:
        """Add the tokens each of ``experts [N, K]`` was given; drafts without gradients do not count."""
        if torch.is_grad_enabled():
            load += torch.zeros(len(experts), len(load), device=load.device).scatter_(1, experts, 1.0).sum(0)

    @torch.no_grad()
    def step(self) -> None:
        """Move the biases by the load since the last call."""
        for router, load in zip(self.routers, self.loads, strict=True):
            router.expert_bias += RATE * (load.mean() - load).sign()
            load.zero_()
