"""Which of several strings ends a text, and what is kept of it."""

from types import SimpleNamespace

from shared.decode.stop_strings import StopStrings


def test_the_string_completed_first_ends_the_text():
    """A reader of one token after the other never sees the end of the longer one."""
    stops = StopStrings(["giving away 23", "away 2", "First"], lambda ids: "", SimpleNamespace())
    assert stops.first("after giving away 23 there") == len("after giving ")
    assert stops.first("First, after giving away 23") == 0
    assert stops.first("after") is None


def test_of_two_that_end_together_the_longer_one_counts():
    stops = StopStrings(["b c", "a b c"], lambda ids: "", SimpleNamespace())
    assert stops.first("x a b c") == 2
