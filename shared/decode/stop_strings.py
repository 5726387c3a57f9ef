"""Strings that end a text: looked for when a block is finished, and only where there are any."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

from shared.decode.calls import Stop
from shared.decode.cursor import BlockCursor, Finished
from shared.errors import UserError
from shared.output import Completion

TextOf = Callable[[list[int]], str]


class StopStrings:
    """Ends rows whose text holds one of ``strings``. ``text_of(ids)`` decodes; it may be None when there are no strings."""

    def __init__(self, strings: str | Sequence[str], text_of: TextOf | None, cursor: BlockCursor | None = None):
        self.strings = strings if isinstance(strings, Stop) else Stop.of(strings, None)
        if self.strings and text_of is None:
            raise UserError("stop strings are given without a tokenizer. Allowed: both")
        self.text_of, self.cursor = text_of, cursor
        shown = [s for s in self.strings if s not in self.strings.special]
        views = [(text_of, shown), (self.strings.raw_of, self.strings.special)]
        self.views = [(view, some) for view, some in views if some]

    def first(self, text: str) -> int | None:
        """Where the string begins that ``text`` completes first, as a reader of one token after the other would see it."""
        found = span_of(text, self.strings)
        return None if found is None else found[0]

    def end(self, finished: list[Finished]) -> list[Finished]:
        """``finished`` blocks, those in whose text a string has appeared being their text's last. One device read for each block."""
        if not self.strings:
            return finished
        return [f if f.last or not self._stands_in(f.row) else f._replace(last=True, stopped=True) for f in finished]

    def _stands_in(self, i: int) -> bool:
        ids = self.cursor.text_so_far(i)
        return any(span_of(view(ids), some) for view, some in self.views)

    def cut(self, completion: Completion) -> Completion:
        """The completion before the string that ends it; see `kept`."""
        found = self.kept(completion.tokens)
        return completion if found is None else replace(completion, tokens=found.tokens, text=found.text)

    def kept(self, ids: list[int]) -> Kept | None:
        """What stays before the string that is completed first: its text exactly, its tokens up to the one in which the string begins. None without one."""
        ends = []
        for view, some in self.views:
            text = view(ids)
            if span := span_of(text, some):
                ends.append((reaching(ids, view, text[: span[1]]), view, text[: span[0]]))
        if not ends:
            return None
        _, view, before = min(ends, key=lambda end: end[0])
        count = reaching(ids, view, before)
        if view is self.text_of:
            return Kept(ids[:count], before)
        # The text without specials, less what the last token holds of the string.
        text, beyond = self.text_of(ids[:count]), len(view(ids[:count])) - len(before)
        least = len(self.text_of(ids[: count - 1])) if count else 0
        return Kept(ids[:count], text[: max(least, len(text) - beyond)])


class Kept(NamedTuple):
    """The tokens and the text before a stop string."""

    tokens: list[int]
    text: str


def span_of(text: str, strings: Collection[str]) -> tuple[int, int] | None:
    """``(begin, end)`` of the string that ``text`` completes first; of those that end together the longest."""
    found = [(at + len(s), at) for s in strings if (at := text.find(s)) >= 0]
    return min(found)[::-1] if found else None


def reaching(ids: list[int], text_of: TextOf, text: str) -> int:
    """How many tokens it takes until they begin with ``text``. A character of several tokens is there when its last one is."""
    return next(n for n in range(len(ids) + 1) if n == len(ids) or text_of(ids[:n]).startswith(text))
