"""The frontier measures what it says: accuracy by the task's judge, texts equal to block size one, a table a README can be made from."""

from __future__ import annotations

import json

from eval import agreement, frontier


def test_small_grid_on_a_cpu(capsys, tmp_path):
    path = tmp_path / "rows.jsonl"
    frontier.main(
        [
            "--grid",
            "small",
            "--problems",
            "3",
            "--batch_size",
            "3",
            "--task",
            "instructions",
            "--json",
            str(path),
            "--device",
            "cpu",
        ]
    )
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    rows = {r["setting"]: r for r in result["rows"]}
    assert rows == {r["setting"]: r for r in map(json.loads, path.read_text().splitlines())}
    one = rows["block size one (AR)"]
    exact = rows["B=16 S2D2 always exact cache_ver"]
    assert exact["lossless"]
    assert one["same_as_block_size_one"] == exact["same_as_block_size_one"] == 3
    assert one["accuracy"] == exact["accuracy"]
    assert exact["forwards_per_token"] < one["forwards_per_token"]


def test_tables_are_made_between_their_marks(tmp_path):
    rows = [
        {"setting": n, "accuracy": 0.5, "tokens": 10, "texts": 4, "forwards_per_token": 0.4, "same_as_block_size_one": 2,
         "accepted_length": 3.0, "forwards": {"prefill": 1, "draft": 2, "verify": 1, "commit": 0}} for n in ("B=8 x", "B=16 x")
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = "before\n<!-- frontier: rows.jsonl ^B=16 -->\nold\n<!-- /frontier -->\nafter"
    made = frontier.refreshed(text, tmp_path)
    assert "| B=16 x | 50.0 | 0.400 | 0.100, 0.200, 0.100, 0.000 | 3.0 | 2 / 4 |" in made
    assert "B=8" not in made
    assert "old" not in made
    assert frontier.refreshed(made, tmp_path) == made
    assert made.startswith("before\n")
    assert made.endswith("after")


def test_common_prefix():
    assert agreement.common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert agreement.common_prefix([1, 2], [1, 2, 4]) == 2
    assert agreement.common_prefix([], [1]) == 0
