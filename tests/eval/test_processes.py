"""`python -m eval` in several processes: every document once, as often as its task repeats it."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests import programs

TASK = """task: few
custom_dataset: !function data.load
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{q}}"
repeats: 2
num_fewshot: 0
generation_kwargs: {max_gen_toks: 6, until: [], temperature: 1.0, do_sample: true}
metric_list:
  - metric: exact_match
"""

RUN = """import json, os, sys
from pathlib import Path
from datasets import Dataset
from lm_eval import evaluate
from lm_eval.tasks import TaskManager
from eval.model import DraftAndVerifyLM
from shared.errors import run_main

def main():
    lm = DraftAndVerifyLM(pretrained="SDAR/tiny", batch_size=4, predictions=sys.argv[1] + "/texts")
    tasks = TaskManager(include_path=sys.argv[1], include_defaults=False).load(["few"])
    found = evaluate(lm=lm, task_dict=tasks, log_samples=True, bootstrap_iters=0)
    if lm.rank == 0:
        samples = sorted(found["samples"]["few"], key=lambda s: s["doc_id"])
        Path(sys.argv[1], "found.json").write_text(json.dumps([[s["resps"] for s in samples], lm.get_model_info()["decoding"]["texts"]]))

run_main(main)
"""


def run(folder, documents: int, processes: int) -> list[subprocess.CompletedProcess]:
    (folder / "few.yaml").write_text(TASK)
    (folder / "data.py").write_text(
        "from datasets import Dataset\n\n\n"
        f"def load(**unused):\n    return {{'test': Dataset.from_list([{{'q': f'word {{k}}'}} for k in range({documents})])}}\n"
    )
    (folder / "run.py").write_text(RUN)
    words = [str(folder / "run.py"), str(folder)]
    return programs.run_ranks(words, folder, processes) if processes > 1 else [programs.run(words, folder)]


@pytest.mark.slow
def test_uneven_shares_are_not_padded(tmp_path):
    """Documents, twice each, by two processes: what one process gives, also where the second gets no document."""
    found = {}
    for documents, processes in ((3, 1), (3, 2), (1, 2)):
        folder = tmp_path / f"{documents}-{processes}"
        folder.mkdir()
        for done in run(folder, documents, processes):
            assert done.returncode == 0, done.stderr
        resps, texts = found[documents, processes] = json.loads((folder / "found.json").read_text())
        assert [[len(r) for r in of] for of in resps] == [[2]] * documents
        assert texts == 2 * documents
        lines = [line for path in (folder / "texts").glob("*.jsonl") for line in path.read_text().splitlines()]
        assert len(lines) == 2 * documents
    assert found[3, 1] == found[3, 2]
    assert found[1, 2][0] == found[3, 1][0][:1]
