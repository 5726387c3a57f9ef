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
