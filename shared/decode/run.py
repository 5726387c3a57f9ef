"""A decode in progress: what it was asked for, its canvas and cursor, its lanes, and how the work between forwards is run."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from shared.decode.calls import Job
from shared.decode.canvas import Canvas
from shared.decode.cursor import BlockCursor, most_iterations
from shared.decode.lanes import Lane
from shared.decode.stop_strings import StopStrings
from shared.gpu.engine import Engine, Inputs, Staged, phases_for
from shared.gpu.graphs import on_device
from shared.gpu.phases import Stateful, call
from shared.network import masks
from shared.network.features import Features
from shared.network.kv_cache import BlockCache, Window
from shared.options import Acceptance, Cache
from shared.output import Completion, Lossless, Output
from shared.policy.accept import accept_span
from shared.policy.routing import Never, Policy, make_policy
from shared.policy.uniforms import Uniforms

# What a decoder without these groups has. Made once: an options object checks itself whenever it is made.
_NO_CACHE, _NO_ACCEPTANCE = Cache(), Acceptance()


def inference(decode: Callable[..., Output]) -> Callable[..., Output]:
    """Decorates ``decode(model, ...)``: no gradients, and the model's GPU is the current one."""

    @functools.wraps(decode)
    def guarded(model, *arguments, **keywords) -> Output:
        with torch.inference_mode(), on_device(model.device):
            return decode(model, *arguments, **keywords)

    return guarded


@dataclass
class Run:
    """One decode in progress. ``lanes``: by name, the one whose tokens are returned first. ``phase`` runs a function of device tensors, as a graph where
    that is possible. ``done``: finished texts by the position of their prompts."""

    STATE: ClassVar[tuple[str, ...]] = ()

    job: Job
    canvas: Canvas
    cursor: BlockCursor
    lanes: dict[str, Lane]
    policy: Policy
    phase: Callable = call
    prefill_seconds: float = 0.0
    done: dict[int, Completion] = field(default_factory=dict)

    def __post_init__(self):
        tokenizer = self.job.call.tokenizer
        text_of = None if tokenizer is None else lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
        self.stops = StopStrings(self.job.call.stop, text_of, self.cursor)

    def run_phases_with(self, *owners: Stateful) -> None:
        """From here on phases are graphs where forwards are. ``owners`` hold the state they read and write."""
        options = self.job.options
        # How long the texts are decides nothing between forwards.
        same = replace(options, blocks=replace(options.blocks, max_new_tokens=1))
        signature = (same, self.job.call.accept_rule)
        self.phase = phases_for([lane.engine for lane in self.lanes.values()], signature, [self, *owners])

    @property
    def options(self) -> Any:
        return self.job.options

    @property
    def lane(self) -> Lane:
        """The lane whose tokens are returned: of a self-speculative decoder the only one."""
        return next(iter(self.lanes.values()))

    @property
    def cache(self) -> BlockCache:
        return self.lane.cache

    @property
    def cache_options(self) -> Cache:
        return getattr(self.options, "cache", _NO_CACHE)

    @property
    def acceptance(self) -> Acceptance:
        return getattr(self.options, "acceptance", _NO_ACCEPTANCE)

    @property
    def whole_verify(self) -> bool:
        """Does a verify carry the whole block whatever the span?"""
        outside = self.acceptance.ssd_ratio_threshold >= 0 and self.acceptance.ssd_threshold_all_spans
        return outside or not self.options.savings.short_verify

    def stage(self, inputs: Inputs, where) -> Inputs | Staged:
        """See `shared.gpu.engine.Engine.stage`."""
        return self.lane.engine.stage(inputs, where)

    def forward(
        self, kind: str, rows: Sequence[int], staged: Inputs | Staged, window: Window, features: Features | None = None
    ) -> Tensor:
        """See `Lane.forward`."""
        return self.lane.forward(kind, rows, staged, window, features)

    def plain_forward(self, rows: list[int]) -> Tensor:
        """One pass over the blocks of ``rows`` through the network as it is, from which numbers that broke can be traced."""
        index, length = self.canvas.index(rows), self.cursor.block_length
        block = self.cursor.block(index)
        ids = torch.cat([block, torch.full_like(block, self.canvas.mask_id)], 1)
        positions, mask = self.cursor.positions(index).repeat(1, 2), masks.two_copy_verify(length, ids.device)
        return self.lane.model(ids, positions, self.cache.window(2 * length, rows), mask)

    def suppress_mask(self, logits: Tensor) -> Tensor:
        """The logits without the mask token, unless the options allow it."""
        if self.options.sampling.suppress_mask:
            logits[..., self.canvas.mask_id] = float("-inf")
        return logits

    def output(self, lossless: Lossless) -> Output:
        """What this decode returns."""
        if self.job.call.accept_rule is not accept_span:
            lossless = Lossless(False, "acceptance is by a script", lossless.relative_to)
        return Output(
            [self.done[k] for k in sorted(self.done)],
            time.perf_counter() - self.job.began,
            lossless,
            batch={name: lane.batch for name, lane in self.lanes.items()},
            sizes={name: lane.sizes for name, lane in self.lanes.items()},
            prefill_seconds=self.prefill_seconds,
        )


def policy_of(options, rows: int, device) -> Policy:
    """The policy that ``options`` name, with state for ``rows`` rows; one that never verifies where they have no routing."""
    if not hasattr(options, "routing"):
        return Never()
    return make_policy(options.routing, options.bandit, options.estimation, options.unmask, rows=rows, device=device)


def block_canvas(job: Job, engine: Engine, *, block_length: int, steps: int, per_block: int) -> Canvas:
    """A canvas as large as ``engine``, for texts in blocks of at most twice ``steps`` and ``per_block`` random numbers."""
    blocks, rows, slots = job.options.blocks, len(engine.cache.lengths), engine.cache.slots
    return Canvas(
        job.prompts,
        requests=job.call.requests,
        rows=job.rows,
        allocated=rows,
        width=slots,
        iterations=most_iterations(slots, block_length, steps),
        max_new_tokens=blocks.max_new_tokens,
        mask_id=blocks.mask_id,
        stop_ids=blocks.stopping_criteria_idx,
        device=engine.cache.length.device,
        uniforms=_uniforms(job, engine, per_block, block_length),
    )


def _uniforms(job: Job, engine: Engine, per_block: int, block_length: int) -> Uniforms:
    recorded = job.call.uniforms
    most = max(per_block * (job.options.blocks.max_new_tokens // block_length + 2), 1)
    count = most if recorded is None else max(map(len, recorded), default=1)
    room = per_block * (engine.cache.slots // block_length + 2)
    device = engine.cache.length.device
    return Uniforms(len(engine.cache.lengths), count, seed=job.call.seed, device=device, recorded=recorded, room=room)
