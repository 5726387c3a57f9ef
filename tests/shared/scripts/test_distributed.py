from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import UserError
from shared.output import Completion, Lossless, Output
from shared.scripts.distributed import World
from shared.trace import Spent, Trace


def test_one_process_without_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert World.from_environment() == World(rank=0, size=1, local=0)


def test_what_torchrun_says(monkeypatch):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert World.from_environment() == World(rank=5, size=8, local=1)


@given(st.integers(1, 5), st.integers(0, 12))
def test_every_item_has_one_owner(size, count):
    shares = [World(rank, size, rank).share(range(count)) for rank in range(size)]
    assert sorted(k for share in shares for k in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("world", "name", "want"),
    [
        (World(3, 4, 3), "auto", "cuda:1"),
        (World(2, 4, 2), "cuda", "cuda:0"),
        (World(3, 4, 3), "cuda:0", "cuda:0"),
        (World(3, 4, 3), "cpu", "cpu"),
        (World(0, 1, 0), "auto", "auto"),
    ],
)
def test_processes_are_spread_over_two_gpus(monkeypatch, world, name, want):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert world.device(name) == want


def test_without_a_gpu_all_use_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert World(1, 2, 1).device("auto") == "auto"


def output(requests: list[int], seconds: float, batch_forwards: dict[str, int]) -> Output:
    trace = Trace(1, 1, [1, 2], [-1, 0], [1, 2], [0, 0], [0.0, 1.0], 1, [], {"model": {"draft": Spent(1)}})
    completions = [Completion(k, [2], trace, seconds, 0) for k in requests]
    width = {"draft": 4, "verify": 8}
    batch = {"model": {kind: Spent(n, width[kind] * n) for kind, n in batch_forwards.items()}}
    return Output(completions, seconds, Lossless(True, "why"), batch, prefill_seconds=seconds / 2)


def gathered(monkeypatch, rank: int, parts: list[Output | None]) -> Output | None:
    """What process ``rank`` has after all have brought their part; the exchange itself is played."""

    def exchange(room: list, mine: Output | None) -> None:
        assert mine is parts[rank]
        room[:] = parts

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_gather_object", exchange)
    return World(rank, len(parts), rank).gather(parts[rank])


def test_outputs_become_one(monkeypatch):
    parts = [output([0, 3], 2.0, {"draft": 4, "verify": 1}), output([1, 4], 3.0, {"draft": 2}), None]
    whole = gathered(monkeypatch, 0, parts)
    assert [c.request for c in whole.completions] == [0, 1, 3, 4]
    assert (whole.seconds, whole.prefill_seconds) == (3.0, 1.5), "the slowest"
    assert whole.batch_forwards == {"draft": 6, "verify": 1}
    assert whole.batch_tokens == {"draft": 24, "verify": 8}
    assert whole.lossless == Lossless(True, "why")
    assert gathered(monkeypatch, 1, parts) is None
    assert gathered(monkeypatch, 2, parts) is None


def test_the_first_decides(monkeypatch):
    """Its answer, or its refusal, is everybody's; the others are not asked."""
    sent = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda told, src: sent.append(list(told)))
    assert World(0, 2, 0).decided(lambda: {3: "x"}) == {3: "x"}

    def refuse():
        raise UserError("no")

    with pytest.raises(UserError, match=r"^no$"):
        World(0, 2, 0).decided(refuse)
    assert sent == [[{3: "x"}, None], [None, "no"]]
    for told in sent:
        monkeypatch.setattr(
            dist, "broadcast_object_list", lambda room, src, told=told: room.__setitem__(slice(None), told)
        )
        if told[1]:
            with pytest.raises(UserError, match=r"^no$"):
                World(1, 2, 1).decided(pytest.fail)
        else:
            assert World(1, 2, 1).decided(pytest.fail) == {3: "x"}
    assert World(0, 1, 0).decided(lambda: 5) == 5


def test_nobody_decoded_anything(monkeypatch):
    assert gathered(monkeypatch, 0, [None, None]) is None


def test_one_process_gathers_nothing():
    alone = output([0], 1.0, {})
    assert World(0, 1, 0).gather(alone) is alone
    assert World(0, 1, 0).gather(None) is None
