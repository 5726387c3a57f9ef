"""The training loop every objective shares: a schedule in seconds or steps, averaged weights, a progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from train.data import Batch
from train.optim import optimizers

WARM_UP_STEPS = 100
AVERAGE_DECAY = 0.998
SHOW_EVERY = 20

Objective = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run amounted to. ``rows`` are the exercises seen, ``tokens`` the padded positions of one copy of each."""

    steps: int
    seconds: float
    rows: int
    tokens: int
    loss: float

    def as_dict(self) -> dict:
        return asdict(self)


def learning_rate_scale(step: int, progress: float) -> float:
    """Warm-up by steps, level for half of the run, then a straight line to zero. ``progress`` is in [0, 1]."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * min(1.0, 2 * (1 - progress))


class Average:
    """An exponential average of the weights; its memory grows with the run until it reaches `AVERAGE_DECAY`."""

    def __init__(self, model: nn.Module):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(AVERAGE_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        torch._foreach_copy_(self.parameters, self.values)


def fit(
    model: nn.Module,
    objective: Objective,
    batches: Iterator[Batch],
    *,
    seconds: float | None,
    steps: int | None,
    optimizer_list: list[torch.optim.Optimizer] | None = None,
    clip: float | None = None,
) -> Outcome:
    """Train ``model`` in place until ``seconds`` have passed or ``steps`` are done; it ends with the averaged weights.

    The clock starts after the first step, which may compile. ``optimizer_list``: by default `train.optim.optimizers`. ``clip``: the largest norm of
    the gradient (None: any).
    """
    device, learned = model.device, [p for p in model.parameters() if p.requires_grad]
    optimizer_list, average = optimizer_list or optimizers(model), Average(model.train())
    for optimizer in optimizer_list:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    step, rows, tokens, progress, shown = 0, 0, 0, 0.0, float("nan")
    bar = tqdm(total=steps, unit="step", desc="train", mininterval=1.0)
    start = time.perf_counter()
    while progress < 1:
        batch = next(batches).to(device)
        scale = learning_rate_scale(step, progress)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = objective(model, batch)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(learned, clip)
        for optimizer in optimizer_list:
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * scale
            optimizer.step()
            optimizer.zero_grad()
        average.update(step)
        if step == 0:
            shown, start = loss.item(), time.perf_counter()
        step, rows, tokens = step + 1, rows + len(batch.tokens), tokens + batch.tokens.numel()
        if step % SHOW_EVERY == 0:
            shown = loss.item()
            bar.set_postfix_str(
                f"loss {shown:.4f}, {tokens / (time.perf_counter() - start):,.0f} tokens/s", refresh=False
            )
        bar.update()
        elapsed = time.perf_counter() - start
        progress = max(step / steps if steps else 0.0, elapsed / seconds if seconds else 0.0)
    bar.close()
    average.copy_to_model()
    model.eval()
    return Outcome(step, round(elapsed, 1), rows, tokens, round(loss.item(), 4))
