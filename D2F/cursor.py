"""Where each text of D2F stands: blocks counted from the prompt's end, several of them in flight (Wang et al. 2025, D2F, section 3.3).

A block is added as masks, is decided position by position, and is finished with its last mask. Finished blocks are encoded by the next pass, in order: a
later block that is finished waits for the earlier ones. So a text is ``[cached | finished, to be cached | in flight]``, and a pass reads the last two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from d2f.options import StandardOptions
from shared.decode.canvas import Canvas
from shared.decode.cursor import Cursor, Finished, whole_blocks
from shared.policy.draft import Choice, Draft
from shared.trace import How, Pass


@dataclass
class Text:
    """What the host knows of a row's blocks, numbered from 0. ``left``: masks in each block that was added; ``goes_on``: must each gain a token in every
    step? Those before ``finished`` are decided and no longer in flight; ``shown`` is up to where the text has been streamed."""

    prompt: int
    total: int  # positions of prompt and text
    shown: int
    left: list[int] = field(default_factory=list)
    goes_on: list[bool] = field(default_factory=list)
    finished: int = 0
    stopped: bool = False  # a stop token was decided somewhere: no block is added
    end: int = 0  # up to here it is decided
    passes: list[Pass] = field(default_factory=list)


class Pipeline(Cursor):
    """The blocks of every row of ``canvas``. ``plan [rows, 2 + n]`` is for the device: where the blocks in flight begin and end, and which of them go on."""

    STATE: ClassVar[tuple[str, ...]] = ("plan", "_stops")

    def __init__(self, canvas: Canvas, options: StandardOptions, positions: int):
        """``positions``: the most tokens a text may take, prompt included."""
        super().__init__(canvas, options.blocks.trim_stop_tokens)
        self.blocks, self.pipeline, self.end_early = options.blocks, options.pipeline, options.savings.end_early
        self.block_length, self.most = (
            options.blocks.block_length,
            min(positions, options.blocks.max_length or positions),
        )
        self.texts: dict[int, Text] = {}  # by row
        device = canvas.tokens.device
        columns = 2 + whole_blocks(canvas.max_new_tokens, self.block_length) // self.block_length
        self._host = [[0] * columns for _ in canvas.tokens]  # what goes to the device, once a step
        self.plan = torch.tensor(self._host, device=device)
        self._stops = torch.tensor(canvas.stop_ids, dtype=torch.long, device=device)

    # Host: which blocks there are.

    def begin(self, rows: Sequence[int]) -> None:
        for i in rows:
            prompt = len(self.canvas.rows[i].prompt)
            new = max(0, min(self.canvas.max_new_tokens, self.most - prompt))
            if self.blocks.floor_to_blocks:
                new -= new % self.block_length
            self.texts[i] = Text(prompt, prompt + new, prompt, end=prompt)

    def prefilled(self, i: int) -> int:
        """The prompt, which the first pass holds; nothing where there is no text to decode."""
        text = self.texts[i]
        return text.prompt if text.total > text.prompt else 0

    def border(self, i: int, block: int) -> int:
        """Where a block of row ``i`` begins (the last one may be cut)."""
        text = self.texts[i]
        return min(text.prompt + block * self.block_length, text.total)

    def over(self, i: int) -> bool:
        """Is there nothing left to do for row ``i``?"""
        text = self.texts[i]
        in_flight = text.finished < len(text.left)
        return not in_flight and (text.stopped or self.border(i, len(text.left)) == text.total)

    def decided(self, i: int, block: int) -> float:
        """The share of a block that is decided; of -1, which is the prompt, all."""
        size = self.border(i, block + 1) - self.border(i, block)
        return 1.0 if block < 0 else (size - self.texts[i].left[block]) / size

    def add_blocks(self, rows: Sequence[int]) -> None:
        """Add a block to each row whose newest one is decided far enough, find those that must go on, and tell the device."""
        most, enough = self.pipeline.max_blocks_in_flight, self.pipeline.decoded_token_threshold
        for i in rows:
            text, added = self.texts[i], len(self.texts[i].left)
            room = self.border(i, added) < text.total and not text.stopped and (most is None or self.in_flight(i) < most)
            if room and self.decided(i, added - 1) >= self.pipeline.block_add_threshold:
                text.left.append(self.border(i, added + 1) - self.border(i, added))
                text.goes_on.append(False)
            for block in range(text.finished, len(text.left)):
                text.goes_on[block] |= self.decided(i, block - 1) >= enough
            flags = text.goes_on[text.finished :]
            self._host[i][: 2 + len(flags)] = [self.first(i), self.last(i), *flags]
        self.plan.copy_(torch.tensor(self._host), non_blocking=True)

    def empty(self, rows: Sequence[int]) -> list[int]:
        """The rows that have nothing to decode from the beginning."""
        return [i for i in rows if self.texts[i].total == self.texts[i].prompt]

    def first(self, i: int) -> int:
        """Where the blocks in flight of row ``i`` begin."""
        return self.border(i, self.texts[i].finished)

    def last(self, i: int) -> int:
        """Where they end."""
        return self.border(i, len(self.texts[i].left))

    def in_flight(self, i: int) -> int:
        """How many they are."""
        return len(self.texts[i].left) - self.texts[i].finished

    # Device: what stands there.

    def window(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """``(positions, inside) [b, W]`` from the first block in flight of ``rows [b]`` on; ``inside``: in one of these blocks?"""
        positions = self.plan[rows, :1] + torch.arange(width, device=rows.device)
        return positions, positions < self.plan[rows, 1:2]

    def block_of(self, rows: Tensor, positions: Tensor, length: int) -> Tensor:
        """``[b, T]``: in which block of ``length`` the ``positions [b, T]`` of ``rows [b]`` are: -1 in the prompt, and past the last block one that nobody sees."""
        number = (positions - self.canvas.prompt_length[rows, None]).div(length, rounding_mode="floor").clamp(min=-1)
        return torch.where(positions < self.plan[rows, 1:2], number, self.canvas.tokens.shape[1])

    def goes_on(self, rows: Tensor, width: int) -> Tensor:
        """``[b, W]``: positions of blocks in flight that must gain a token in every step."""
        flags = self.plan[rows, 2 : 2 + width // self.block_length].bool()
        return flags.repeat_interleave(self.block_length, 1)

    def record(self, draft: Draft, choice: Choice, sent: Tensor | None, finite: Tensor | None) -> Tensor:
        """Write the step's choice into the canvas. Returns what `finish_step` has to know, ``[b, 4 + W / L]``. No host read.

        ``sent [b]``: tokens of the span that were verified (0: none); ``finite [b]``: were the verifier's logits numbers? Both are None where no row was verified.
        """
        canvas, index, width = self.canvas, draft.rows, draft.block.shape[1]
        positions, inside = self.window(index, width)
        ids = canvas.write(index, positions, draft.block, choice, draft.confidence)
        broken = ~(torch.isfinite(draft.confidence) | ~draft.masked).all(-1) * 1
        if sent is not None:
            accepted = (choice.how == How.ACCEPTED).sum(-1)
            canvas.note_verify(index, sent > 0, draft.masked.sum(-1), draft.span_length, accepted)
            broken = broken + ~finite * 2
        canvas.step(index)
        masked = inside & (ids == canvas.mask_id)
        left = masked.view(len(index), -1, self.block_length).sum(-1)
        stop = inside & (ids[..., None] == self._stops).any(-1)
        solid = (inside & ~masked).cumprod(-1)
        read = [stop.any(-1), (stop & (solid > 0)).any(-1), solid.sum(-1), broken]
        return torch.cat([torch.stack(read, 1).long(), left], 1)

    # Host again.

    def finish_step(self, rows: Sequence[int], read: list[list[int]]) -> list[Finished]:
        """Count the step of every row, and find those in which blocks were finished, from what `record` returned."""
        finished = []
        for i, (stop, ended, solid, broken, *left) in zip(rows, read, strict=True):
            text, row = self.texts[i], self.canvas.rows[i]
            row.iterations += 1
            if broken:
                which = "draft" if broken % 2 else "verifier"
                raise FloatingPointError(f"{self.where(i)}: the {which} logits hold NaN or infinity")
            text.end, text.stopped = self.first(i) + solid, text.stopped or bool(stop)
            text.left[text.finished :] = left[: self.in_flight(i)]
            before = text.finished
            while self.in_flight(i) and text.left[text.finished] == 0:
                text.finished += 1
            last = self.over(i) or (self.end_early and bool(ended))
            if last or text.finished > before:
                finished.append(Finished(i, last, 0, bool(ended)))
            elif row.iterations >= self.canvas.iterations:
                raise RuntimeError(
                    f"{self.where(i)}: {sum(text.left)} positions are still masked after as many steps as tokens"
                )
        return finished

    def where(self, i: int) -> str:
        """Location, for error messages."""
        return f"request {self.canvas.rows[i].request}, blocks from position {self.first(i)} on, step {self.canvas.rows[i].iterations}"

    def text_so_far(self, i: int) -> list[int]:
        """Generated ids of row ``i`` up to the first mask (a device read; for stop strings)."""
        return self.canvas.tokens[i, self.texts[i].prompt : self.texts[i].end].tolist()

    def new_tokens(self, i: int) -> list[int]:
        """Those that came since this was last asked (a device read; for streaming)."""
        text = self.texts[i]
        begin, text.shown = text.shown, text.end
        return self.canvas.tokens[i, begin : text.end].tolist()

    def end(self, i: int) -> int:
        return self.texts[i].end

    def passes(self, i: int) -> list[Pass]:
        return self.texts[i].passes
