"""Strings that end a text: looked for when a block is finished, and only where there are any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from shared.decode.cursor import BlockCursor, Finished
from shared.errors import UserError
from shared.output import Completion


class StopStrings:
    """Ends rows whose text holds one of ``strings``. ``text_of(ids)`` decodes; it may be None when there are no strings."""

    def __init__(self, strings: Sequence[str], text_of: Callable[[list[int]], str] | None, cursor: BlockCursor):
        self.strings = [strings] if isinstance(strings, str) else list(strings)
        if not all(isinstance(s, str) and s for s in self.strings):
            raise UserError(f"stop is {strings!r}. Allowed: strings that are not empty")
        if self.strings and text_of is None:
            raise UserError("stop strings are given without a tokenizer. Allowed: both")
        self.text_of, self.cursor = text_of, cursor

    def first(self, text: str) -> int | None:
        """Where the string begins that ``text`` completes first, as a reader of one token after the other would see it."""
        found = [(at + len(s), at) for s in self.strings if (at := text.find(s)) >= 0]
        return min(found)[1] if found else None

    def end(self, finished: list[Finished]) -> list[Finished]:
        """``finished`` blocks, those in whose text a string has appeared being their text's last. One device read for each block."""
        if not self.strings:
            return finished
        return [f if f.last or not self._stands_in(f.row) else f._replace(last=True, stopped=True) for f in finished]

    def _stands_in(self, i: int) -> bool:
        return self.first(self.text_of(self.cursor.text_so_far(i))) is not None

    def cut(self, completion: Completion) -> Completion:
        """The completion before the string that ends it: its text exactly, its tokens up to the one in which the string begins."""
        at = self.first(completion.text) if self.strings else None
        if at is None:
            return completion
        kept = next(n for n in range(len(completion.tokens) + 1) if len(self.text_of(completion.tokens[:n])) >= at)
        return replace(completion, tokens=completion.tokens[:kept], text=completion.text[:at])
