from __future__ import annotations

from shared.errors import UserError, unknown_name


def test_the_nearest_names_are_suggested():
    error = unknown_name("policy", "alway", ["always", "never"])
    assert isinstance(error, UserError)
    assert str(error) == "unknown policy 'alway'; did you mean always? Allowed: always, never"


def test_nothing_near():
    text = str(unknown_name("policy", "zzz", iter(["always", "never"])))
    assert "did you mean" not in text
    assert text.startswith("unknown policy 'zzz'")
    assert text.endswith("Allowed: always, never")


def test_no_name_is_told_twice():
    text = str(unknown_name("option", "block_lenght", ["block_length", "top_k", "block_length"]))
    assert text == "unknown option 'block_lenght'; did you mean block_length? Allowed: block_length, top_k"


def test_a_full_stop_stands_before_what_is_allowed():
    assert str(unknown_name("policy", "zzz", ["always"])) == "unknown policy 'zzz'. Allowed: always"
