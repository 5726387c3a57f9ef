"""What a forward is counted as: for the batch once, for each text as if it ran alone."""

from __future__ import annotations

from types import SimpleNamespace

from shared.decode.lanes import Lane
from shared.gpu.engine import Staged
from shared.gpu.graphs import Shape
from shared.network.kv_cache import BlockCache
from shared.trace import Spent

CACHE = BlockCache(1, 3, 1, 32, 2)
CACHE.commit([4, 10, 0])


def new_lane(name="model") -> tuple[Lane, dict]:
    spent: dict = {}
    rows = [
        SimpleNamespace(spend=lambda lane, kind, *n, row=row: spent.update({(row, lane, kind): Spent(*n)}))
        for row in range(3)
    ]
    engine = SimpleNamespace(cache=CACHE, run=lambda staged, window, features: "logits")
    return Lane(name, engine, SimpleNamespace(rows=rows)), spent


def test_one_entry_a_text():
    lane, spent = new_lane("target")
    staged = Staged(Shape(2, 8, picks=3), 2)
    assert lane.forward("draft", [0, 1], staged, CACHE.window(8, [0, 1])) == "logits"
    assert spent == {
        (0, "target", "draft"): Spent(forwards=1, tokens=8, logits=3, context=4, pairs=8 * 12),
        (1, "target", "draft"): Spent(forwards=1, tokens=8, logits=3, context=10, pairs=8 * 18),
    }
    assert lane.batch == {"draft": Spent(1, 16, 6, 14, 8 * 30)}
    lane.forward("draft", [0, 1], staged, CACHE.window(8, [0, 1]))
    assert lane.batch["draft"].forwards == 2


def test_a_commit_that_goes_along_is_the_same_forward():
    """Its tokens count and its logits do not; what is cached of the text is read once, and not what this forward is writing."""
    lane, spent = new_lane()
    window = CACHE.window(8, [0, 1, 1], ahead=[0, 8, 0])
    lane.forward("draft", [0, 1, 1], Staged(Shape(2, 8, commit_rows=1), 2), window)
    assert spent[1, "model", "draft"] == Spent(forwards=1, tokens=16, logits=8, context=10, pairs=8 * 26 + 8 * 18)
    assert lane.batch["draft"].forwards == 1
