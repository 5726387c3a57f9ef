"""The probe decodes with the decoders of any family, as the family describes them."""

from __future__ import annotations

import pytest

from shared.family import FAMILIES
from shared.network.loading import load_tokenizer
from shared.scripts.models import load_models
from train.probe import judge, probe, settings_of, table
from train.tasks import held_out


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_that_ships_a_checkpoint(name):
    """Four instructions: most are right (0.9 of them on average), exact speculation says what the baseline says, for fewer forwards than tokens."""
    family = FAMILIES[name]
    checkpoints = family.checkpoints(next(iter(family.shipped)))
    models, tokenizer = load_models(family, checkpoints), load_tokenizer(checkpoints[family.first])
    rows = probe(family, models, tokenizer, count=4, seed=0, run_code=False, tasks=["instructions", "functions"])
    assert [(r["task"], r["decoder"]) for r in rows] == [("instructions", n) for n in settings_of(family)]
    found = {r["decoder"]: r for r in rows}
    assert found["baseline"]["accuracy"] >= 50
    assert found["exact"] | {"decoder": "", "forwards_per_token": 0} == found["baseline"] | {
        "decoder": "",
        "forwards_per_token": 0,
    }
    assert found["exact"]["lossless"]
    assert found["exact"]["forwards_per_token"] < 0.8 < found["baseline"]["forwards_per_token"]
    assert table(rows).splitlines()[0] == "| decoder | instructions |"


def test_functions_are_judged_by_running_them():
    problems = held_out("functions", 3)
    texts = [p.solution for p in problems]
    assert judge(problems, texts) == [True] * 3
    assert judge(problems, [texts[0], texts[2], "no code"]) == [True, False, False]
