"""How a network of this repository looks at a text: prompt and region in one pass, or the region behind a cache of what is finished.

``block_length`` None: every token sees every other (LLaDA). Otherwise a token sees its own block and all before it; blocks are counted from position 0 or,
``from_prompt``, from the prompt's end, where the prompt is a block of its own. Behind such a mask keys and values of finished blocks last, so that they
need not be computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mdlm_dvd.src.texts import Texts
from shared.gpu.engine import Engine
from shared.gpu.graphs import Shape
from shared.options import Runtime
from shared.trace import Spent

WIDTH_STEP = 32  # passes are this multiple wide, so that few graphs serve all prompts


@dataclass
class Network:
    """``model`` is a `shared.network.decoder.DecoderModel`. ``leave_out``: a token of it sees itself, so that it is asked about drafts that
    it does not see, unless told otherwise. ``next_token``: row ``t`` of its logits predicts token ``t + 1``, where the model does not say so itself."""

    model: Any
    block_length: int | None = None
    from_prompt: bool = True
    leave_out: bool = False
    next_token: bool = False
    runtime: Runtime = field(default_factory=Runtime)
    engine: Engine | None = None
    held: list[int] = field(default_factory=list)  # of every row, how many tokens the cache holds
    texts: Texts | None = None  # whose they are

    @property
    def predicts_next(self) -> bool:
        return self.next_token or getattr(self.model, "predicts_next", False)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def can_cache(self) -> bool:
        return self.block_length is not None

    def whole(self, texts: Texts, rows: Sequence[int], region: Tensor, hide_prompt: bool = False):
        """``(logits [b, G, V], spent)`` of one pass over the texts of ``rows`` with ``region [b, G]``; ``hide_prompt`` masks the prompt. Row ``j`` of the
        logits predicts region position ``j``."""
        lengths = [texts.lengths[i] + texts.gen_length for i in rows]
        ids = texts.with_region(rows, region)[:, : max(lengths)]
        if hide_prompt:
            prompt = torch.arange(ids.shape[1], device=ids.device) < texts.canvas.prompt_length[texts.index(rows)][:, None]
            ids = ids.masked_fill(prompt, texts.mask_id)
        logits = self._pass(texts, rows, ids, None, lengths, texts.positions(rows))
        spent = [Spent(1, n, texts.gen_length, 0, n * n) for n in lengths]
        return logits, spent

    def queried(self, texts: Texts, rows: Sequence[int], region: Tensor):
        """The same from masks beside the text, one for each place of the region: it sees itself and all of the text that its place may see, but for the token
        that stands there. (What other tokens have seen of that one still reaches it.)"""
        lengths = [texts.lengths[i] + texts.gen_length for i in rows]
        width, here = max(lengths), texts.positions(rows)
        ids = texts.with_region(rows, region)[:, :width]
        layout = torch.cat([ids, torch.full_like(region, texts.mask_id)], 1)
        places = torch.arange(width, device=ids.device).expand_as(ids)
        seen = self._mask(texts, rows, places, torch.tensor(lengths, device=ids.device)[:, None])
        asks = seen.gather(1, here[..., None].expand(-1, -1, width)) & (places[:, None] != here[..., None])
        itself = torch.eye(here.shape[1], dtype=torch.bool, device=ids.device).expand(len(rows), -1, -1)
        mask = torch.cat([seen, torch.zeros_like(asks.transpose(1, 2))], 2)
        mask = torch.cat([mask, torch.cat([asks, itself], 2)], 1)
        positions = torch.cat([places, here], 1)
        logits = self.model(layout, positions, None, mask, logits_at=slice(width, None))
        asked = texts.gen_length
        return logits, [Spent(1, n + asked, asked, 0, n * n + asked * (n + 1)) for n in lengths]

    def ordered(self, texts: Texts, rows: Sequence[int], region: Tensor):
        """The same at block size one: the mask beside place ``j`` sees the prompt and what stands in the region before ``j``, whose tokens see each other from
        left to right as well. So row ``j`` is what the network writes next after the first ``j`` tokens of ``region``, for all ``j`` in one pass. (A
        network that predicts the next token needs no masks.)"""
        lengths = [texts.lengths[i] + texts.gen_length for i in rows]
        width, here = max(lengths), texts.positions(rows)
        ids = texts.with_region(rows, region)[:, :width]
        places = torch.arange(width, device=ids.device).expand_as(ids)
        # Where blocks are counted from its end, the prompt sees itself whole; else it is token-causal too.
        place = (places - here[:, :1]).clamp(min=-1) if self.from_prompt else places - here[:, :1]
        seen = place[:, None] <= place[:, :, None]
        if self.predicts_next:
            logits = self.model(ids, places, None, seen, logits_at=here - 1)
            return logits, [Spent(1, n, texts.gen_length, 0, n * n) for n in lengths]
        layout = torch.cat([ids, torch.full_like(region, texts.mask_id)], 1)
        asks = place[:, None] < torch.arange(here.shape[1], device=ids.device)[:, None]
        itself = torch.eye(here.shape[1], dtype=torch.bool, device=ids.device).expand(len(rows), -1, -1)
        mask = torch.cat([seen, torch.zeros_like(asks.transpose(1, 2))], 2)
        mask = torch.cat([mask, torch.cat([asks, itself], 2)], 1)
        logits = self.model(layout, torch.cat([places, here], 1), None, mask, logits_at=slice(width, None))
        asked = texts.gen_length
        return logits, [Spent(1, n + asked, asked, 0, n * n + asked * (n + 1)) for n in lengths]

    def cached(self, texts: Texts, rows: Sequence[int], region: Tensor):
        """The same logits where a position is masked, with a forward over what is not finished only. Finished blocks of the canvas are kept."""
        self._open(texts)
        finished = self._finished(texts, rows)
        held = [self.held[i] for i in rows]
        lengths = [texts.lengths[i] + texts.gen_length for i in rows]
        width = max(n - h for n, h in zip(lengths, held, strict=True))
        before = torch.tensor(held, device=self.device)[:, None]
        ids = texts.with_region(rows, region)
        at = (before + torch.arange(width, device=self.device)).clamp(max=ids.shape[1] - 1)
        logits = self._pass(texts, rows, ids.gather(1, at), held, lengths, texts.positions(rows) - before)
        self.engine.cache.commit([f - h for f, h in zip(finished, held, strict=True)], rows)
        for i, count in zip(rows, finished, strict=True):
            self.held[i] = count
        new = [n - h for n, h in zip(lengths, held, strict=True)]
        return logits, [Spent(1, n, texts.gen_length, h, n * (n + h)) for n, h in zip(new, held, strict=True)]

    def crop(self, length: int) -> None:
        """Forget what the cache holds from position ``length`` on."""
        for i, held in enumerate(self.held):
            if held > length:
                self.engine.cache.commit([length - held], [i])
                self.held[i] = length

    def _open(self, texts: Texts) -> None:
        if self.texts is not texts:
            self.texts, self.held = texts, [0] * len(texts)
            self._engine(len(texts), 2 * texts.canvas.tokens.shape[1] + WIDTH_STEP, ())

    def _finished(self, texts: Texts, rows: Sequence[int]) -> list[int]:
        """How many tokens of each text lie in blocks that are decided: whole ones, and before the region nothing is masked."""
        masked = (texts.region(rows) == texts.mask_id).int()
        decided = torch.nn.functional.pad(masked, (0, 1), value=1).argmax(-1).tolist()
        found = []
        for i, count in zip(rows, decided, strict=True):
            first = texts.lengths[i] if self.from_prompt else 0
            found.append(first + (texts.lengths[i] + count - first) // self.block_length * self.block_length)
        return found

    def _block_of(self, texts: Texts, rows: Sequence[int], positions: Tensor) -> Tensor:
        """``[b, T]``: the block of each position; everything is one where there are none."""
        if self.block_length is None:
            return torch.zeros_like(positions)
        first = texts.canvas.prompt_length[texts.index(rows)][:, None] if self.from_prompt else 0
        return ((positions - first).div(self.block_length, rounding_mode="floor")).clamp(min=-1)

    def _mask(self, texts: Texts, rows: Sequence[int], positions: Tensor, end: Tensor) -> Tensor:
        """``[b, T, T]``: what tokens at ``positions [b, T]`` see of each other; padding, from ``end [b, 1]`` on, is in a block behind all others."""
        block = self._block_of(texts, rows, positions).masked_fill(positions >= end, 1 << 30)
        return block[:, None] <= block[:, :, None]

    def _pass(
        self, texts: Texts, rows: Sequence[int], ids: Tensor, held: list[int] | None, lengths: list[int], at: Tensor
    ) -> Tensor:
        """Logits ``[b, G, V]`` of the tokens ``ids [b, T]`` behind the ``held`` ones of each row (None: by themselves), at the columns ``at [b, G]``."""
        count, limit = ids.shape[1], self.model.config.max_position_embeddings
        if on_gpu := self.device.type == "cuda":
            count = -(-count // WIDTH_STEP) * WIDTH_STEP
            ids = torch.nn.functional.pad(ids, (0, count - ids.shape[1]), value=texts.mask_id)
        before = torch.tensor(held or [0] * len(rows), device=ids.device)[:, None]
        positions = before + torch.arange(count, device=ids.device)
        end = torch.tensor(lengths, device=ids.device)[:, None]
        mask = self._mask(texts, rows, positions, end)
        at = (at - int(self.predicts_next)).clamp(0, count - 1)
        positions = positions.clamp(max=limit - 1)
        if held is None and (not on_gpu or self.texts is texts):
            return self.model(ids, positions, None, mask, logits_at=at)
        if held is None:
            kind = Shape(1, count, picks=at.shape[1])
            self._engine(len(texts), texts.canvas.tokens.shape[1] + WIDTH_STEP, (kind,))
        window = self.engine.cache.window(count, rows)
        return self.engine.forward(ids, positions, window, mask, logits_at=at)

    def _engine(self, rows: int, slots: int, kinds: tuple[Shape, ...]) -> None:
        self.engine = Engine.of(self.model, rows, slots, kinds, self.runtime)
