"""What a call may ask."""

import pytest

from shared.decode.calls import Call
from shared.errors import UserError


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"seed": -1}, "seed is -1. Allowed: an int from 0 to"),
        ({"seed": 1 << 63}, "seed is 9223372036854775808"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"batch_size": 1.5}, "batch_size is 1.5. Allowed: an int of at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"requests": [1, 1]}, "all different"),
        ({"uniforms": [[0.5]]}, "one for each of the 2 prompts"),
    ],
)
def test_impossible_calls_are_refused(call, message):
    fine = {"requests": [3, 4], "uniforms": None, "batch_size": 1, "seed": (1 << 63) - 1}
    Call(**fine).check(2)
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        Call(**{**fine, **call}).check(2)
