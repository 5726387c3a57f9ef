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
    """``model`` is a `shared.network.decoder.DecoderModel`. ``next_token``: row ``t`` of its logits predicts token ``t + 1``, where the model does not say
    so itself."""

    model: Any
    block_length: int | None = None
    from_prompt: bool = True
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
        places, end = _places(ids), torch.tensor(lengths, device=ids.device)[:, None]
        if hide_prompt:
            ids = ids.masked_fill(places < texts.canvas.prompt_length[texts.index(rows)][:, None], texts.mask_id)
        logits = self._alone(ids, places, self._mask(texts, rows, places, end), self._rows_of(texts.positions(rows)))
        return logits, [Spent(1, n, texts.gen_length, 0, n * n) for n in lengths]

    def queried(self, texts: Texts, rows: Sequence[int], region: Tensor):
        """The same from masks beside the text, one for each place of the region: it sees itself and all of the text that its place may see, but for the token
        that stands there. (What other tokens have seen of that one still reaches it.)"""
        lengths = [texts.lengths[i] + texts.gen_length for i in rows]
        ids, here = texts.with_region(rows, region)[:, : max(lengths)], texts.positions(rows)
        places = _places(ids)
        seen = self._mask(texts, rows, places, torch.tensor(lengths, device=ids.device)[:, None])
        asks = seen.gather(1, here[..., None].expand(-1, -1, ids.shape[1])) & (places[:, None] != here[..., None])
        return self._beside(texts, ids, places, here, seen, asks, lengths)

    def ordered(self, texts: Texts, rows: Sequence[int], region: Tensor):
        """The same at block size one: the mask beside place ``j`` sees the prompt and what stands in the region before ``j``, whose tokens see each other from
        left to right as well. So row ``j`` is what the network writes next after the first ``j`` tokens of ``region``, for all ``j`` in one pass. (A
        network that predicts the next token needs no masks.)"""
        lengths = [texts.lengths[i] + texts.gen_length for i in rows]
        ids, here = texts.with_region(rows, region)[:, : max(lengths)], texts.positions(rows)
        places = _places(ids)
        # Where blocks are counted from its end, the prompt sees itself whole; else it is token-causal too.
        place = (places - here[:, :1]).clamp(min=-1) if self.from_prompt else places - here[:, :1]
        seen = place[:, None] <= place[:, :, None]
        if self.predicts_next:
            logits = self._alone(ids, places, seen, self._rows_of(here))
            return logits, [Spent(1, n, texts.gen_length, 0, n * n) for n in lengths]
        asks = place[:, None] < torch.arange(here.shape[1], device=ids.device)[:, None]
        return self._beside(texts, ids, places, here, seen, asks, lengths)

    def _beside(
        self, texts: Texts, ids: Tensor, places: Tensor, here: Tensor, seen: Tensor, asks: Tensor, lengths: list[int]
    ):
        """A pass over ``[ids [b, T] | a mask for each place here [b, G]]``: tokens see each other by ``seen [b, T, T]``, a mask sees itself and, by
        ``asks [b, G, T]``, tokens."""
        masks = torch.full_like(here, texts.mask_id)
        itself = torch.eye(here.shape[1], dtype=torch.bool, device=ids.device).expand(len(ids), -1, -1)
        top = torch.cat([seen, torch.zeros_like(asks.transpose(1, 2))], 2)
        mask = torch.cat([top, torch.cat([asks, itself], 2)], 1)
        asked, width = here.shape[1], ids.shape[1]
        at = (width + torch.arange(asked, device=ids.device)).expand(len(ids), -1)
        logits = self._alone(torch.cat([ids, masks], 1), torch.cat([places, here], 1), mask, at)
        return logits, [Spent(1, n + asked, asked, 0, n * n + asked * (n + 1)) for n in lengths]

    def cached(self, texts: Texts, rows: Sequence[int], region: Tensor):
        """The logits of `whole` where a position is masked, with a forward over what is not finished only. Finished blocks of the canvas are kept."""
        self._open(texts)
        finished = self._finished(texts, rows)
        held = [self.held[i] for i in rows]
        lengths = [texts.lengths[i] + texts.gen_length for i in rows]
        width = self._wide(max(n - h for n, h in zip(lengths, held, strict=True)))
        before, end = (torch.tensor(numbers, device=self.device)[:, None] for numbers in (held, lengths))
        ids = texts.with_region(rows, region)
        places = before + torch.arange(width, device=self.device)
        mask = self._mask(texts, rows, places, end)
        window = self.engine.cache.window(width, rows)
        given = ids.gather(1, places.clamp(max=ids.shape[1] - 1)), self._within(places)
        at = (self._rows_of(texts.positions(rows)) - before).clamp(0, width - 1)
        logits = self.engine.forward(*given, window, mask, logits_at=at)
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
        """Begin with an empty cache where the texts are others than before."""
        if self.texts is not texts:
            self.texts, self.held = texts, [0] * len(texts)
            # Behind the cache; the first pass, with the prompt in it, is worth no graph.
            widths = range(WIDTH_STEP, self._wide(texts.gen_length) + 1, WIDTH_STEP)
            kinds = [Shape(1, width, picks=texts.gen_length) for width in widths]
            slots = 2 * texts.canvas.tokens.shape[1] + WIDTH_STEP
            self.engine = Engine.of(self.model, len(texts), slots, kinds, self.runtime)

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

    def _rows_of(self, places: Tensor) -> Tensor:
        """The rows of the logits that predict the tokens at ``places``."""
        return (places - int(self.predicts_next)).clamp(min=0)

    def _within(self, places: Tensor) -> Tensor:
        """``places`` that the network has: padding may lie past them."""
        return places.clamp(max=self.model.config.max_position_embeddings - 1)

    def _wide(self, count: int) -> int:
        """How many tokens a pass over ``count`` has: on a GPU a multiple of `WIDTH_STEP`."""
        return -(-count // WIDTH_STEP) * WIDTH_STEP if self.device.type == "cuda" else count

    def _alone(self, ids: Tensor, places: Tensor, mask: Tensor, at: Tensor) -> Tensor:
        """Logits ``[b, G, V]`` at the columns ``at [b, G]`` of a pass over the tokens ``ids [b, T]`` at ``places [b, T]``, which see each other by ``mask
        [b, T, T]`` and nothing else."""
        if self.device.type != "cuda":
            return self.model(ids, places, None, mask, logits_at=at)
        more = self._wide(ids.shape[1]) - ids.shape[1]
        ids, places = (torch.nn.functional.pad(x, (0, more)) for x in (ids, places))
        mask = torch.nn.functional.pad(mask, (0, more, 0, more))
        mask = mask | torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)  # padding sees itself
        engine = self._whole_engine(len(ids), ids.shape[1], at.shape[1])
        return engine.forward(ids, places, engine.cache.window(ids.shape[1], range(len(ids))), mask, logits_at=at)

    def _whole_engine(self, rows: int, tokens: int, picks: int) -> Engine:
        """The engine of passes without a cache, whose rows hold a pass and are never committed. The model keeps it, beside that of cached passes."""
        last, kind = getattr(self.model, "whole_engine", None), Shape(1, tokens, picks=picks)
        if last is not None and last.serves(rows, tokens, (kind,), self.runtime):
            return last
        kinds = {kind} if last is None else {kind, *last.kinds}
        if last is not None:
            rows, tokens = max(rows, len(last.cache.lengths)), max(tokens, last.cache.slots)
            last.close()
        self.model.whole_engine = Engine(self.model, rows, tokens, tuple(kinds), self.runtime)
        return self.model.whole_engine


def _places(ids: Tensor) -> Tensor:
    """``[b, T]``: 0, 1, ... for each of ``ids [b, T]``."""
    return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
