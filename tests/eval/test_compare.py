"""`python -m eval.compare`: its grids, its statistics, what it measures and resumes, its report and the tables of READMEs."""

from __future__ import annotations

import csv
import json
import math
import random
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest

from eval import agreement, calibration, compare, plots, results
from eval.cells import OFFLINE, Bench, cell_key
from eval.docs import refreshed
from eval.grid import grid_of, read_grid, run_of_flag
from eval.records import trace_of
from eval.roofline import Machine
from eval.stats import loss_bound, mcnemar, problems_needed, wilson
from sdar import SDARForCausalLM
from shared.errors import UserError
from shared.family import FAMILIES
from shared.network.sizes import sizes_of
from shared.output import Completion
from shared.scripts.identity import fingerprint
from shared.trace import Spent, Trace, Verify

ROOT = Path(__file__).parents[2]
GRIDS = sorted((ROOT / "eval" / "grids").glob("*.yaml"))
RUNS = [
    {"decoder": "standard", "name": "one", "options": {"block_length": 1}},
    {
        "decoder": "standard",
        "name": "plain {confidence_threshold}",
        "group": "plain B=16",
        "options": {"confidence_threshold": [0.6, 0.99]},
    },
    {"decoder": "ssd_policy", "name": "exact", "group": "S2D2", "preset": "tiny", "options": {"block_length": 16}},
]
GRID = {
    "name": "a test",
    "tasks": ["instructions"],
    "problems": 4,
    "batch_size": 4,
    "dtype": "float32",
    "baseline": "one",
    "calibrate": 2,
    "runs": RUNS,
}


@pytest.mark.parametrize(("right", "count"), [(0, 10), (7, 10), (256, 256), (241, 256)])
def test_wilson(right, count):
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson(right, count) == pytest.approx((expected.low, expected.high), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_every_interval_contains_its_share():
    for count in range(1, 400):
        for right in {0, 1, count // 3, count - 1, count, count / 7}:
            low, high = wilson(right, count)
            assert 0.0 <= low <= right / count <= high <= 1.0
    assert wilson(20, 20)[1] == 1.0
    assert wilson(0, 20)[0] == 0.0


def test_a_comparison_in_which_all_are_right_is_drawn(tmp_path):
    low, high = wilson(20, 20)
    row = contestant("one", 1.0, 1.0) | {"group": "one", "low": low, "high": high, "lane_forwards_per_token": {}}
    drawn = plots.draw({"rows": [row], "grid": {"baseline": "one"}}, [{"group": "one", "task": "t", "accepted": {}, "calibration": {}, "family": "F"}], tmp_path)  # fmt: skip
    assert drawn["forwards-light"].stat().st_size > 0


def test_mcnemar_is_the_binomial_test_of_the_problems_only_one_solves():
    rng = random.Random(0)
    for _ in range(20):
        first, second = ([rng.random() < share for _ in range(60)] for share in (0.7, 0.5))
        better, worse, p = mcnemar(first, second)
        assert p == pytest.approx(binomtest(better, better + worse).pvalue)
    assert mcnemar([True, False], [True, False]) == (0, 0, 1.0)


@pytest.mark.parametrize(("count", "bound"), [(8, 0.3123), (149, 0.0199), (256, 0.0116)])
def test_the_bound_of_a_loss_where_no_pair_differs(count, bound):
    assert loss_bound(0, 0, count) == pytest.approx(bound, abs=1e-4)


def test_the_bound_is_where_the_score_test_of_the_likelihood_turns():
    """Tango's bound from its definition: the restricted maximum of the likelihood found by search, not by his formula."""
    for worse, better, count in [(5, 2, 60), (0, 3, 40), (9, 9, 200), (4, 0, 100), (10, 10, 100), (3, 0, 8)]:
        loss = loss_bound(worse, better, count)

        def likelihood(q, worse=worse, better=better, count=count, loss=loss):
            parts = ((worse, q + loss), (better, q), (count - worse - better, 1 - 2 * q - loss))
            return sum(n * math.log(max(share, 1e-300)) for n, share in parts if n)

        best = minimize_scalar(lambda q: -likelihood(q), bounds=(0, (1 - loss) / 2), method="bounded", options={"xatol": 1e-12}).x  # fmt: skip
        spread = count * (2 * best + loss * (1 - loss))
        assert (worse - better - count * loss) / math.sqrt(spread) == pytest.approx(-1.6449, abs=2e-3)


def test_how_many_problems_would_do():
    assert problems_needed(0, 0, 8, 0.02) == 149
    needed = problems_needed(1, 1, 50, 0.02)
    assert (
        loss_bound(needed / 50, needed / 50, needed)
        <= 0.02
        < loss_bound((needed - 1) / 50, (needed - 1) / 50, needed - 1)
    )
    assert problems_needed(3, 0, 8, 0.02) is None


def test_a_small_sample_proves_nothing():
    """Eight problems, 62.5 % against 100 %: not equal. Eight against eight: cannot tell. The very texts of a lossless decoder: equal."""
    base = contestant("base", 1.0, 1.0, options={"block_length": 1}, problems=8, low=0.6, high=1.0)
    known = {"problems": 8, "low": 0.2, "high": 1.0}
    rows = [
        base,
        contestant("poor", 0.625, 0.1, better=0, worse=3, **known),
        contestant("as good", 1.0, 0.2, 5, better=0, worse=0, **known),
    ]
    equal = next(w for w in results.winners(rows, "base") if w["bar"] == "equal")
    assert (equal["plain"], equal["speculative"]) == (None, None)
    assert equal["needed"] == {"plain": None, "speculative": 149}
    (_, _, _, line) = results.winners_table(rows, {"grid": {"baseline": "base"}})
    assert line == "| F | t | 100.0 (60.0 to 100.0) | less by 2 points at most | none | cannot tell, 149 would do |  |"
    proved = rows[2] | {"lossless": True, "same": 8}
    assert results.is_equal(proved, base)
    assert not results.is_equal(proved | {"same": 7}, base)
    assert not results.is_equal(proved | {"lossless": False}, base)
    assert results.is_equal(rows[2] | {"problems": 256}, base)


def test_a_grid_sweeps_lists_and_variants():
    run = {"decoder": "ssd_policy", "name": "{variant} {block_length}", "options": {"block_length": [8, 16], "cache_ver": True},
           "variants": {"a": {"do_verify_policy": "always"}, "n": {"do_verify_policy": "never"}}}  # fmt: skip
    grid = grid_of({"name": "g", "tasks": ["functions", {"task": "gsm8k", "metric": "exact_match"}], "runs": [run]})
    assert [s.name for s in grid.settings] == ["a 8", "a 16", "n 8", "n 16"]
    assert grid.settings[3].options == {"block_length": 16, "cache_ver": True, "do_verify_policy": "never"}
    assert grid.tasks[1].metric == "exact_match"
    assert run_of_flag("family=SDAR,decoder=standard,block_length=8/16,confidence_threshold=0.9") == {
        "family": "SDAR", "decoder": "standard", "options": {"block_length": [8, 16], "confidence_threshold": 0.9}}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem": 3}, "did you mean problems"),
        ({"runs": [{"family": "SDAR", "option": {}}]}, "did you mean options"),
        ({"runs": [{"options": {"block_lenght": 8}}]}, "did you mean block_length"),
        ({"runs": [{"decoder": "ssd"}]}, "unknown decoder"),
        ({"runs": [{"name": "x"}, {"name": "x", "decoder": "standard"}]}, "names that differ"),
        ({"runs": [{"name": "{block}"}]}, "asks for 'block'"),
        ({"baseline": "two"}, "unknown baseline"),
        ({"tasks": []}, "no runs or no tasks"),
        ({"tasks": "instructions"}, "tasks is 'instructions'. Allowed: a list"),
        ({"tasks": [{"metric": "acc"}]}, "a task is {'metric': 'acc'}. Allowed: a name"),
        ({"tasks": [{"task": "instructions", "matric": "acc"}]}, "did you mean metric"),
        ({"runs": ["SDAR"]}, "a run is 'SDAR'. Allowed: a mapping"),
        ({"runs": [{"options": [1]}]}, "options of a run is [1]. Allowed: a mapping"),
        ({"runs": [{"options": {8: 1}}]}, "unknown option '8'"),
        ({"runs": [{"variants": {"a": 1}}]}, "variant 'a' is 1. Allowed: a mapping"),
        ({"runs": [{"name": "{"}]}, "name '{' cannot be filled in"),
        ({"runs": [{"preset": "tinny"}]}, "did you mean tiny"),
        ({"problems": "all"}, "problems is 'all'. Allowed: int"),
        ({"problems": 0}, "problems is 0. Allowed: at least 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"calibrate": -1}, "calibrate is -1. Allowed: at least 0"),
        ({"chat": "perhaps"}, "chat is 'perhaps'. Allowed: true or false"),
    ],
)
def test_a_wrong_grid_is_told_in_one_line(change, message):
    with pytest.raises(UserError) as caught:
        grid_of({**GRID, **change})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["instructions", "instruction"]}, "unknown task 'instruction'; did you mean instructions"),
        ({"tasks": ["instructions", "functions"]}, "task 'functions' runs model-written code. Allowed: --confirm_run"),
        ({"tasks": [{"task": "instructions", "metric": "accuracy"}]}, "unknown metric 'accuracy'"),
        ({"tasks": [{"task": "instructions", "metric": "acc,strict"}]}, "unknown filter of metric 'strict'"),
        ({"runs": [*RUNS, {"pretrained": "/none", "name": "x"}]}, "model '/none': no such folder"),
        ({"runs": [*RUNS, {"options": {"max_new_tokens": 10**6}, "name": "x"}]}, "max_new_tokens is 1000000. Allowed"),
        ({"runs": [*RUNS, {"options": {"mask_id": 10**6}, "name": "x"}]}, "mask_id 1000000 is outside the vocabulary"),
        ({"dtype": "float7"}, "dtype 'float7' is unknown"),
    ],
    ids=str,
)
def test_all_is_checked_before_the_first_cell(change, message, monkeypatch, tmp_path):
    """A grid whose first cells would do is refused for what only its last one has."""
    monkeypatch.setattr("eval.cells.OFFLINE", (*OFFLINE, "instruction"))  # without lm-eval's index of public tasks
    monkeypatch.setattr(Bench, "__init__", lambda *a, **k: pytest.fail("begun"))
    (tmp_path / "grid.yaml").write_text(json.dumps({**GRID, **change}))
    with pytest.raises(UserError) as caught:
        compare.main([str(tmp_path / "grid.yaml"), "--output", str(tmp_path / "out"), "--device", "cpu"])
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", GRIDS, ids=lambda p: p.stem)
def test_shipped_grids_can_be_read(path):
    assert read_grid(path).settings


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    (folder / "grid.yaml").write_text(json.dumps(GRID))
    compare.main([str(folder / "grid.yaml"), "--output", str(folder), "--device", "cpu"])
    return folder


def test_what_is_measured(measured):
    rows = {r["setting"]: r for r in json.loads((measured / "results.json").read_text())["rows"]}
    one, exact = rows["one"], rows["exact"]
    assert list(rows) == ["one", "plain 0.6", "plain 0.99", "exact"]
    assert exact["lossless"]
    assert not rows["plain 0.6"]["lossless"]
    assert one["same"] == exact["same"] == 4
    assert (exact["better"], exact["worse"], exact["p"]) == (0, 0, 1.0)
    assert exact["accuracy"] == one["accuracy"] == sum(map(int, one["solved"])) / 4
    assert rows["plain 0.6"]["forwards_per_token"] < exact["forwards_per_token"] < 1 < one["forwards_per_token"]
    assert sum(exact["by_kind"].values()) == pytest.approx(exact["forwards_per_token"])
    assert exact["mean_acceptance_length"] > exact["accepted_per_verify"] > 1
    assert exact["lane_forwards_per_token"] == {"model": pytest.approx(exact["forwards_per_token"])}
    assert all(r["floor_seconds_per_token"] > 0 for r in rows.values())
    assert exact["lossless_reason"].startswith("every token is verified")
    assert exact["lossless_relative_to"] == "block size one"
    with (measured / "results.csv").open() as file:
        assert [line["setting"] for line in csv.DictReader(file)] == list(rows)


def test_work_is_that_of_the_networks_sizes(measured):
    """The floor of a cell is that of its lanes' work on the machine, which was measured once."""
    found = json.loads((measured / "results.json").read_text())
    machine = Machine.from_json(found["machine"])
    assert machine == compare.machine_in(measured)
    (cell,) = (c for c in compare.cells_in(measured) if c["setting"] == "exact")
    (row,) = (r for r in found["rows"] if r["setting"] == "exact")
    sizes = sizes_of(SDARForCausalLM.from_pretrained("SDAR/tiny", dtype="float32"))
    seconds = 0.0
    for kind, spent in cell["lanes"]["model"].items():
        work = sizes.work(Spent(**spent))
        assert cell["work"]["model"][kind] == work._asdict()
        seconds += machine.floor(work)
    assert row["floor_seconds_per_token"] == pytest.approx(seconds / row["tokens"])
    assert sum(s["forwards"] for s in cell["lanes"]["model"].values()) == sum(cell["forwards"].values())


def test_traces_calibrate_and_replay(measured):
    cells = {c["setting"]: c for c in compare.cells_in(measured)}
    exact, plain = cells["exact"], cells["plain 0.6"]
    assert sum(exact["accepted"].values()) == exact["forwards"]["verify"]
    assert set(calibration.ESTIMATORS) < set(exact["calibration"])
    assert all(true <= n and said <= n + 1e-6 for n, said, true in exact["calibration"]["soft_entropy_negexp"])
    assert plain["calibration"]["accepted"] is None
    assert plain["calibration"]["as baseline"][-1][0] > 0
    replay = exact["replay"]["0"]
    assert len(replay["pieces"]) == exact["tokens"][0] == len(replay["how"])
    assert sum(k for _, _, k in replay["verified"]) >= replay["how"].count("accepted")


def test_edits_are_kept_from_the_prompt_on():
    trace = Trace(prompt_length=2, block_length=4, token_ids=[1, 2, 7, 8, 9], step_of=[-1, -1, 3, 3, 4], how_of=[1, 1, 2, 2, 2],
                  rank_of=[0, 0, 0, 1, 0], confidence_of=[0, 0, 0.5, 0.6, 0.7], steps=5, verifies=[Verify(4, 4, 3, 1)],
                  edits=[(5, 3, 6, 8), (5, 4, 4, 9)])  # fmt: skip
    kept = trace_of(Completion(0, [7, 8], trace, 0.0, 0))
    assert kept["edits"] == [[5, 1, 6, 8]], "the token behind the text's end is not shown"
    assert (kept["ids"], kept["step"], kept["verified"]) == ([7, 8], [3, 3], [[4, 3, 1]])


def test_a_killed_comparison_goes_on(measured, tmp_path):
    """As a kill leaves it: the last cell unwritten, of its texts one and a half on disk."""
    folder = tmp_path / "again"
    shutil.copytree(measured, folder)
    before = json.loads((folder / "results.json").read_text())["rows"]
    lines = (folder / "cells.jsonl").read_bytes().splitlines(keepends=True)
    last = json.loads(lines[-1])["key"]
    (folder / "cells.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:100])
    texts = folder / "predictions" / last / "predictions.jsonl"
    kept = texts.read_bytes().splitlines(keepends=True)
    texts.write_bytes(kept[0] + kept[1][:30])
    compare.main([str(folder / "grid.yaml"), "--output", str(folder), "--device", "cpu"])
    timed = ("seconds", "tokens_per_second")
    after = json.loads((folder / "results.json").read_text())["rows"]
    assert [{k: v for k, v in r.items() if k not in timed} for r in after] == [
        {k: v for k, v in r.items() if k not in timed} for r in before
    ]
    assert texts.read_bytes().startswith(kept[0])
    assert len(texts.read_bytes().splitlines()) == 4, "the torn line is gone"


def test_cells_that_two_grids_share_are_measured_once(measured, tmp_path):
    """A preset and the same options spelled out are one cell; a report calls it what its own grid calls it."""
    folder = tmp_path / "shared"
    shutil.copytree(measured, folder)
    grid = read_grid(folder / "grid.yaml")
    named = {s.name: s for s in grid.settings}
    spelled = replace(named["exact"], name="spelled", group="G", preset=None, options=named["exact"].resolved())
    assert named["exact"].preset == "tiny"
    compare.write(replace(grid, settings=(named["one"], spelled)), folder, 0)
    rows = {r["setting"]: r for r in json.loads((folder / "results.json").read_text())["rows"]}
    assert list(rows) == ["one", "spelled"]
    before = {r["setting"]: r for r in json.loads((measured / "results.json").read_text())["rows"]}["exact"]
    ours = {"setting": "spelled", "group": "G", "preset": None, "options": spelled.options}
    assert rows["spelled"] == before | json.loads(json.dumps(ours))


def contestant(setting, accuracy, forwards, verifies=0, p=1.0, **more):
    return {"family": "F", "pretrained": "tiny", "task": "t", "setting": setting, "accuracy": accuracy, "forwards_per_token": forwards,
            "verifies": verifies, "tokens_per_second": 1 / forwards, "p": p, "options": {}, **more}  # fmt: skip


def test_a_plain_baseline_is_a_contestant_and_checkpoints_do_not_mix():
    even = {"better": 0, "worse": 0, "problems": 1000}
    rows = [contestant("fast", 0.9, 0.3), contestant("spec", 0.9, 0.25, 5, **even)]
    assert results.winners(rows, "fast")[0]["gain"] == pytest.approx(1.2)
    rows += [
        contestant("fast", 0.5, 0.2, pretrained="other"),
        contestant("spec", 0.9, 0.1, 5, pretrained="other", **even),
    ]
    found = {w["family"]: w["gain"] for w in results.winners(rows, "fast") if w["cost"] == "forwards / token"}
    assert found == {"F tiny": pytest.approx(1.2), "F other": pytest.approx(2.0)}


def test_a_cell_is_not_that_of_weights_that_stood_there_before(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"old")
    before = fingerprint(str(tmp_path))
    grid = grid_of({"name": "g", "tasks": ["t"], "runs": [{"family": "SDAR", "pretrained": str(tmp_path)}]})
    key = lambda: cell_key(grid, grid.settings[0], grid.tasks[0], 0)  # noqa: E731
    old = key()
    fingerprint.cache_clear()
    assert (fingerprint(str(tmp_path)), key()) == (before, old)
    (tmp_path / "model.safetensors").write_bytes(b"new weights")
    fingerprint.cache_clear()
    assert key() != old


def test_checkpoints_of_one_name_are_refused():
    runs = [{"family": "SDAR", "pretrained": f"{folder}/tiny", "name": folder} for folder in ("a", "b")]
    with pytest.raises(UserError, match="two checkpoints of SDAR are called 'tiny'"):
        grid_of({"name": "g", "tasks": ["t"], "runs": runs})


def test_checkpoints_of_one_family_share_names_of_settings():
    """Each is compared with its own baseline, and tables say which it is."""
    runs = [{"family": "SDAR", "pretrained": f"{folder}/{folder}", "name": "one"} for folder in ("a", "b")]
    assert [s.name for s in grid_of({"name": "g", "tasks": ["t"], "baseline": "one", "runs": runs}).settings] == [
        "one"
    ] * 2
    with pytest.raises(UserError, match="two settings of SDAR are called 'one'"):
        grid_of({"name": "g", "tasks": ["t"], "runs": [runs[0], runs[0]]})
    more = {"tokens": 1, "accepted_per_verify": None, "lossless": True}
    rows = [contestant("one", 0.9, 1.0, pretrained=name, **more) for name in ("a", "b")]
    assert [line.split(" | ")[0] for line in list(results.families_table(rows, {}))[2:]] == ["| F a", "| F b"]
    assert list(results.families_table(rows[:1], {}))[2].startswith("| F | one |")


def test_a_run_may_have_its_own_tasks_and_put_them_its_own_way():
    own = {"tasks": ["u"], "num_fewshot": 4, "chat": False, "fewshot_as_multiturn": True}
    runs = [{"family": "SDAR", "name": "all"}, {"family": "SDAR", "name": "own", **own}]
    grid = grid_of({"name": "g", "tasks": ["t", {"task": "u", "metric": "acc"}], "num_fewshot": 1, "runs": runs})
    plain, mine = grid.settings
    assert [(a.task, a.num_fewshot, a.chat, a.fewshot_as_multiturn) for a in grid.asked(plain)] == [
        ("t", 1, True, False),
        ("u", 1, True, False),
    ]
    (asked,) = grid.asked(mine)
    assert (asked.task, asked.metric, asked.num_fewshot, asked.chat, asked.fewshot_as_multiturn) == (
        "u",
        "acc",
        4,
        False,
        True,
    )
    assert len({cell_key(grid, plain, a, 0) for a in (grid.asked(plain)[1], asked)}) == 2
    with pytest.raises(UserError, match="unknown task of the grid 'uu'; did you mean u"):
        grid_of({"name": "g", "tasks": ["u"], "runs": [{"family": "SDAR", "tasks": ["uu"]}]})


def test_published_settings_of_d2f_are_written_out():
    """In the grid for the released checkpoints as in the presets; no option of theirs is left to a task."""
    grid = read_grid(ROOT / "eval" / "grids" / "d2f-8b.yaml")
    presets = FAMILIES["D2F"].decoders["d2f"]
    for setting in grid.settings:
        backend, task = setting.name.lower().split()
        assert setting.options == presets.preset(f"{backend}-{task.removesuffix('_cot')}"), setting.name
    shots = [(s.name, grid.asked(s)[0].num_fewshot) for s in grid.settings]
    assert [n for _, n in shots] == [4, 3, 0, 0, 8, 3, 4, 0]
    assert [len(grid.asked(s)) for s in grid.settings] == [1, 1, 7, 1, 1, 1, 7, 1]


def test_an_adapter_is_a_checkpoint_without_a_network(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    assert [name for name, *_ in fingerprint(str(tmp_path))] == ["adapter_config.json", "adapter_model.safetensors"]
    (tmp_path / "adapter_config.json").unlink()
    fingerprint.cache_clear()
    with pytest.raises(UserError, match=r"no config\.json"):
        fingerprint(str(tmp_path))


def test_winners_are_the_cheapest_at_equal_accuracy():
    row = contestant
    rows = [row("one", 0.9, 1.0, options={"block_length": 1}), row("plain fast", 0.5, 0.1, p=0.001), row("plain noise", 0.89, 0.2, better=9, worse=10, problems=1000), row("plain slow", 0.9, 0.4),
            row("spec", 0.9, 0.25, 5, better=0, worse=0, problems=1000), row("spec dear", 0.95, 0.3, 5)]  # fmt: skip
    found = {(w["bar"], w["cost"]): w for w in results.winners(rows, "one")}
    strict, loose = found["at least", "forwards / token"], found["equal", "seconds"]
    assert (strict["plain"]["setting"], strict["speculative"]["setting"]) == ("plain slow", "spec")
    assert strict["gain"] == pytest.approx(1.6)
    assert loose["plain"]["setting"] == "plain noise"
    assert loose["gain"] == pytest.approx(0.8)


def by_lane(row, floor, **lanes):
    return row | {"lane_forwards_per_token": lanes, "floor_seconds_per_token": floor, "mean_acceptance_length": 3.25, "low": 0.0, "high": 1.0,
                  "by_kind": dict.fromkeys(results.KINDS, 0.1), "accepted_per_verify": 2.25, "tokens": 10, "problems": 4, "same": None, "lossless": True,
                  "lossless_relative_to": "the target's own decoding"}  # fmt: skip


def test_lanes_are_ranked_by_the_work_they_do(measured):
    """A drafter runs often and costs little: fewer forwards lose, the lower floor wins."""
    plain = by_lane(contestant("target alone", 0.9, 1.0), 0.004, target=1.0)
    spec = by_lane(contestant("drafted", 0.9, 2.0, 5), 0.001, target=0.4, drafter=1.6)
    (strict, *_) = results.winners([plain, spec], "target alone")
    assert (strict["cost"], strict["gain"]) == ("floor ms / token", pytest.approx(4.0))
    unknown = [r | {"floor_seconds_per_token": None} for r in (plain, spec)]
    assert results.winners(unknown, "target alone")[0]["gain"] == pytest.approx(0.5), "no floor: forwards"
    same = [r | {"lane_forwards_per_token": {"model": 1.0}} for r in (plain, spec)]
    assert results.winners(same, "target alone")[0]["cost"] == "forwards / token"

    found = {"grid": {"baseline": "target alone"}}
    rows = list(results.rows_table([plain, spec], found))
    assert "| forwards / token by lane | floor ms / token | tokens / verify |" in rows[0]
    assert "| target 0.400, drafter 1.600 | 1.000 | 3.2 |" in rows[3]
    assert "lane" not in next(results.rows_table(same, found))
    assert list(results.winners_table([plain, spec], found))[2].endswith(
        "| target alone: 90.0 % at 4.000 ms | drafted: 90.0 % at 1.000 ms | **4.00 x** |"
    )
    other = by_lane(contestant("drafted", 0.8, 1.0, 5, task="u"), 0.003, target=0.2, drafter=0.8)
    line = list(results.families_table([plain, spec, other], found))[3]
    assert line == "| F | drafted | 90.0 | 80.0 | 1.500 | target 0.300, drafter 1.200 | 2.000 | 2.2 | yes |"
    own = plain | {"lossless_relative_to": "block size one"}
    assert list(results.families_table([own, spec], found))[3].endswith("yes (relative to the target's own decoding) |")

    results.write_csv(measured / "lanes.csv", [plain, spec])
    with (measured / "lanes.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["target_forwards_per_token"], first["drafter_forwards_per_token"]) == ("1.0", "")
    assert (second["drafter_forwards_per_token"], second["floor_seconds_per_token"]) == ("1.6", "0.001")


def test_rows_recorded_before_lanes_make_the_tables_they_made():
    """Their keys are those of the first records."""
    old = contestant("drafted", 0.9, 0.5, 5) | {"low": 0.0, "high": 1.0, "by_kind": dict.fromkeys(results.KINDS, 0.1), "accepted_per_verify": 2.25,
                                               "tokens": 10, "problems": 4, "same": 3, "lossless": True}  # fmt: skip
    found = {"grid": {"baseline": "drafted"}}
    assert [len(list(table([old], found))) for table in results.TABLES.values()] == [3, 4, 3]
    assert results.costs_of([old]) == ["forwards / token", "seconds"]
    results_row = list(results.rows_table([old], found))[2]
    assert results_row == "| drafted | 90.0 (0.0 to 100.0) | 0.500 | 0.100, 0.100, 0.100, 0.100 | 2.2 | 1 | 3 / 4 |"


def test_tables_of_what_was_measured(measured):
    text = "<!-- compare rows: results.json instructions ^plain -->\n<!-- /compare -->"
    made = refreshed(text, measured)
    assert "| plain 0.6 |" in made
    assert "| exact |" not in made
    for kind, part in (("winners", "S2D2"), ("families", "| SDAR | exact |")):
        assert part in refreshed(f"<!-- compare {kind}: results.json -->\n<!-- /compare -->", measured)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed (Debian's package nodejs)")
def test_the_logic_of_the_report(tmp_path):
    """report.test.js under node, with McNemar's figures from Python."""
    rng, cases = random.Random(1), []
    for count in (1, 5, 40, 256):
        first, second = ("".join(rng.choice("01") for _ in range(count)) for _ in range(2))
        cases.append(
            {"first": first, "second": second, "expected": mcnemar(*([c == "1" for c in s] for s in (first, second)))}
        )
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        ["node", "--test", str(Path(__file__).parent / "report.test.js")],
        capture_output=True, text=True, env={"PATH": "/usr/bin:/bin:/usr/local/bin", "MCNEMAR_CASES": str(tmp_path / "cases.json")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def browse(page: Path, *flags: str) -> str:
    with tempfile.TemporaryDirectory() as profile:
        call = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}", "--window-size=1300,2400",
                "--virtual-time-budget=2000", *flags, page.as_uri()]  # fmt: skip
        return subprocess.run(call, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian's package chromium)")
def test_the_report_in_a_browser(measured, tmp_path):
    """The page stands alone: its table is filled, a decode is shown, and a picture of it is no blank."""
    from matplotlib.image import imread

    page = tmp_path / "alone" / "report.html"
    page.parent.mkdir()
    shutil.copy(measured / "report.html", page)
    found = browse(page, "--dump-dom")
    assert found.count('<td class="name">') == 4
    assert 'class="token accepted' in found
    assert "solved" in found.split('id="right-verdict"')[1][:40]
    browse(page, f"--screenshot={tmp_path / 'page.png'}")
    picture = imread(tmp_path / "page.png")[..., :3]
    assert picture.shape[:2] == (2400, 1300)
    assert picture.std() > 0.05


def test_common_prefix():
    assert agreement.common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert agreement.common_prefix([1, 2], [1, 2, 4]) == 2
    assert agreement.common_prefix([], [1]) == 0
