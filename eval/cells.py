"""One cell of a comparison: a setting on a task, measured through lm-eval, as plain data."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from eval import calibration, code_eval
from eval.grid import Asked, Grid, Setting
from eval.model import DraftAndVerifyLM
from eval.records import lanes_of, lossless_as_json, work_of
from eval.roofline import Machine
from shared.errors import UserError, unknown_name
from shared.family import family_named
from shared.output import Sizes
from shared.scripts.identity import code_version, fingerprints
from shared.scripts.store import records_in
from shared.trace import How

TASKS = Path(__file__).parent / "tasks"
FEWSHOT_SEED = 1234  # lm-eval's own
OFFLINE = tuple(sorted(path.stem for path in TASKS.glob("*.yaml")))


class Tasks:
    """The tasks of a grid, each loaded once."""

    def __init__(self, grid: Grid):
        from lm_eval.tasks import TaskManager

        code_eval.install()
        others = any(a.task not in OFFLINE for a in grid.tasks)
        self.manager = TaskManager(include_path=str(TASKS), include_defaults=others)
        self._loaded: dict[tuple[str, int | None], dict] = {}

    def load(self, asked: Asked) -> dict:
        """The task with the asked number of examples in its prompts; `UserError` where there is none, or several."""
        key = (asked.task, asked.num_fewshot)
        if key not in self._loaded:
            loaded = self._read(asked.task)
            if len(loaded["tasks"]) != 1:
                raise UserError(
                    f"task {asked.task!r} is a group. Allowed: one of its tasks: {', '.join(loaded['tasks'])}"
                )
            for task in loaded["tasks"].values():
                own = task.get_config("num_fewshot")
                if own is None or (asked.num_fewshot is not None and own != 0):
                    task.set_config(key="num_fewshot", value=asked.num_fewshot or 0)
                task.set_fewshot_seed(seed=FEWSHOT_SEED)
            self._loaded[key] = loaded
        return self._loaded[key]

    def _read(self, name: str) -> dict:
        known = [task for task in self.manager.all_tasks if isinstance(task, str)]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
            hint = f"; did you mean {' or '.join(near)}?" if near else "."
            raise UserError(f"unknown task {name!r}{hint} Allowed: {', '.join(OFFLINE)}, and the tasks of lm-eval")
        try:
            with quiet():
                return self.manager.load([name])
        except Exception as error:  # of its data, its YAML, the hub
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(
                f"task {name!r} cannot be loaded ({reason}). Allowed: a task whose data is at hand"
            ) from error

    def check(self, asked: Asked, run_code: bool) -> None:
        """Raise `UserError` for a task that could not be judged in the end."""
        (task,) = self.load(asked)["tasks"].values()
        if getattr(task, "UNSAFE_CODE", False) and not run_code:
            raise UserError(
                f"task {asked.task!r} runs model-written code. Allowed: --confirm_run_unsafe_code, or other tasks"
            )
        metric, _, chosen = (asked.metric or "").partition(",")
        filters = [f.name for f in getattr(task, "_filters", ())] or ["none"]
        if chosen and chosen not in filters:
            raise unknown_name("filter of metric", chosen, filters)
        if metric and metric not in task.aggregation():
            raise unknown_name("metric", metric, task.aggregation())

    def generation(self, asked: Asked) -> dict | None:
        """What the task asks of generation; None where it only scores."""
        (task,) = self.load(asked)["tasks"].values()
        return dict(task.get_config("generation_kwargs") or {}) if task.OUTPUT_TYPE == "generate_until" else None


class Bench:
    """Measures cells of one family's checkpoints; its predictions go under ``folder``."""

    def __init__(
        self, grid: Grid, first: Setting, folder: Path, tasks: Tasks, *, device: str, seed: int, run_code: bool
    ):
        self.tasks, self.grid, self.folder, self.seed, self.run_code = tasks, grid, folder, seed, run_code
        roles = dict(first.checkpoints)
        self.checkpoints, source = dict(roles), roles.pop(family_named(first.family).first)
        self.lm = DraftAndVerifyLM(
            source, first.family, first.decoder, dtype=grid.dtype, device=device, batch_size=grid.batch_size,
            seed=seed, traces=True, **roles,
        )  # fmt: skip
        self._baselines: dict[str, dict[int, list[int]]] = {}

    def measure(self, setting: Setting, asked: Asked) -> dict | None:
        """The cell; None in the processes that do not lead. What an earlier run left of it is not decoded again."""
        key = cell_key(self.grid, setting, asked, self.seed)
        self.lm.use(setting.decoder, setting.preset, **setting.options)
        self.lm.keep(self.folder / "predictions" / key, resume=True)
        before = Counter(self.lm.deaths)
        samples = self._evaluate(asked, self.grid.problems)
        died = dict(Counter(self.lm.deaths) - before)
        records, lossless = {r["doc"]: r for r in sorted(self.lm.spent, key=lambda r: r["key"])}, self.lm.lossless
        if setting.name == self.grid.baseline:
            self._baselines[asked.task] = {doc: r["ids"] for doc, r in records.items()}
        estimators = {}
        if self.grid.calibrate and any(r["verified"] for r in records.values()):
            estimators = self._estimators(setting, asked)  # every process takes part
        if samples is None:
            return None
        cell = {"key": key, **described(setting, asked), **judged(samples, asked, records), "died": died}
        cell |= spent(records, self.lm.sizes) | traced(records, self._baseline(asked))
        cell |= lossless_as_json(lossless) | {"where": self._where()}
        cell["calibration"] |= estimators
        kept = cell["docs"][: self.grid.replays]
        cell["replay"] = {str(d): self._replay(records[d], samples, d) for d in kept if d in records}
        return cell

    def _evaluate(self, asked: Asked, problems: int | None) -> list[dict] | None:
        """lm-eval's samples of the task, by its own judge (its `simple_evaluate` asks pip for every package each
        time)."""
        from lm_eval import evaluate

        with quiet():
            found = evaluate(
                lm=self.lm, task_dict=self.tasks.load(asked), limit=problems, bootstrap_iters=0, log_samples=True,
                apply_chat_template=asked.chat, fewshot_as_multiturn=asked.fewshot_as_multiturn,
                confirm_run_unsafe_code=self.run_code,
            )  # fmt: skip
        return None if found is None else found["samples"][asked.task]

    def _baseline(self, asked: Asked) -> dict[int, list[int]]:
        """Token ids of the baseline's texts by problem; none where it has not been measured here."""
        if asked.task not in self._baselines:
            mine = (self.lm.family_name, self.checkpoints, self.grid.baseline)
            first = next((s for s in self.grid.settings if (s.family, s.checkpoints, s.name) == mine), None)
            key = cell_key(self.grid, first, asked, self.seed) if first else ""
            texts = records_in(self.folder / "predictions" / key, "predictions", "key") if first else {}
            self._baselines[asked.task] = {r["doc"]: r["ids"] for r in texts.values()}
        return self._baselines[asked.task]

    def _estimators(self, setting: Setting, asked: Asked) -> dict[str, list]:
        """Bins of every acceptance estimator on this process's share. A separate pass, without graphs: estimators read
        the device, which costs time."""
        self.lm.use(setting.decoder, setting.preset, **setting.options, graphs=False)
        self.lm.accept_rule = recorder = calibration.Recorder()
        self.lm.keep(None, resume=False)
        self._evaluate(asked, self.grid.calibrate)
        self.lm.accept_rule = None
        return recorder.bins

    def _replay(self, record: dict, samples: list[dict], doc: int) -> dict:
        """A decode as the report plays it: the text's pieces, each with when, how and how surely it was decided."""
        first = min(record["step"], default=0)
        prompt = next(str(s["arguments"][0][0]) for s in samples if s["doc_id"] == doc)
        return {
            "prompt": prompt,
            "pieces": [self._piece(i) for i in record["ids"]],
            "step": [s - first for s in record["step"]],
            "how": [How(h).name.lower() for h in record["how"]],
            "rank": record["rank"],
            "confidence": [round(c, 3) for c in record["confidence"]],
            "verified": [[k - first, span, taken] for k, span, taken in record["verified"]],
            "edits": [[k - first, at, *map(self._piece, ids)] for k, at, *ids in record["edits"]],
            "forwards": record["forwards"],
        }

    def _piece(self, token: int) -> str:
        return self.lm.tokenizer.decode([token])

    def machine(self) -> Machine:
        """What the machine can do in the model's dtype, measured."""
        return Machine.measure(self.lm.device, self.lm.model.dtype)

    def _where(self) -> dict:
        """What the figures were measured on."""
        import torch

        device = self.lm.device
        name = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
        return {"device": name, "dtype": str(self.lm.model.dtype)[6:], "batch_size": self.grid.batch_size,
                "processes": self.lm.world_size, "torch": torch.__version__}  # fmt: skip


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lm-eval's bars and notes are not shown: a comparison calls it hundreds of times."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def cell_key(grid: Grid, setting: Setting, asked: Asked, seed: int) -> str:
    """The name of a cell: whatever changes its figures changes it, what is in a preset too."""
    family, checkpoints = setting.family, setting.checkpoints
    code, chat = code_version(family_named(family).folder), "multiturn" if asked.fewshot_as_multiturn else asked.chat
    what = [family, setting.decoder, checkpoints, fingerprints(checkpoints), code, setting.resolved()]
    what += [asked.task, asked.metric, grid.problems, grid.batch_size, grid.dtype, chat, asked.num_fewshot, seed]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:20]


def described(setting: Setting, asked: Asked) -> dict:
    """What was run."""
    return {
        "family": setting.family,
        "setting": setting.name,
        "group": setting.group,
        "decoder": setting.decoder,
        "pretrained": setting.checkpoint,
        "preset": setting.preset,
        "options": setting.options,
        "task": asked.task,
    }


def judged(samples: list[dict], asked: Asked, records: dict[int, dict]) -> dict:
    """The problems and what the task's judge gave each."""
    metric, _, chosen = (asked.metric or "").partition(",")
    if chosen and chosen not in {s["filter"] for s in samples}:
        raise unknown_name("filter of metric", chosen, sorted({s["filter"] for s in samples}))
    samples = [s for s in samples if s["filter"] == (chosen or samples[0]["filter"])]
    metric = metric or next(m for m in samples[0]["metrics"])
    if metric not in samples[0]:
        raise unknown_name("metric", metric, samples[0]["metrics"])
    values = {s["doc_id"]: s[metric] for s in samples}
    if not all(isinstance(v, int | float) for v in values.values()):
        raise UserError(f"metric {metric!r} gives no number a problem. Allowed: another of {samples[0]['metrics']}")
    docs = sorted(values)
    return {"metric": metric, "docs": docs, "values": [float(values[d]) for d in docs],
            "tokens": [records[d]["tokens"] if d in records else 0 for d in docs]}  # fmt: skip


def spent(records: dict[int, dict], sizes: dict[str, Sizes]) -> dict:
    """Forwards by kind, what each lane spent and had to move and compute, and the seconds of the slowest process: those
    of its calls up to their last text."""
    lanes = lanes_of(records.values())
    work = work_of(lanes, sizes)
    forwards, calls = Counter(), defaultdict(float)
    for r in records.values():
        forwards.update(r["forwards"])
        calls[r["process"], r["call"]] = max(calls[r["process"], r["call"]], r["at"])
    seconds = defaultdict(float)
    for (process, _), at in calls.items():
        seconds[process] += at
    return {
        "forwards": dict(forwards),
        "lanes": {lane: {k: s._asdict() for k, s in kinds.items()} for lane, kinds in lanes.items()},
        "work": {lane: {k: w._asdict() for k, w in kinds.items()} for lane, kinds in work.items()},
        "verifies": sum(r.get("verifies", 0) for r in records.values()),
        "gained": sum(r.get("gained", 0) for r in records.values()),
        "seconds": round(max(seconds.values(), default=0.0), 4),
    }


def traced(records: dict[int, dict], baseline: dict[int, list[int]]) -> dict:
    """What the traces tell: lengths accepted, calibration of the drafter, texts equal to the baseline's."""
    accepted, known = Counter(), {d: r for d, r in records.items() if "ids" in r}
    for r in known.values():
        accepted.update(a for _, _, a in r["verified"])
    agreed = [p for d, r in known.items() if d in baseline for p in calibration.of_unverified(r, baseline[d])]
    verified = [p for r in known.values() for p in calibration.of_verified(r)]
    return {
        "accepted": {str(k): accepted[k] for k in sorted(accepted)},
        "calibration": {
            "accepted": calibration.bins_of(verified) if verified else None,
            "as baseline": calibration.bins_of(agreed) if agreed else None,
        },
        "same": sum(r["ids"] == baseline.get(d) for d, r in known.items()) if baseline else None,
    }
