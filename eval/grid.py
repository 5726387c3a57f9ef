"""What a comparison runs: families, decoders, settings and tasks, from a YAML file or from flags.

    name: SDAR frontier
    tasks: [word_problems, functions, instructions]     # or {task: gsm8k, metric: "exact_match,flexible-extract"}
    problems: 256
    baseline: block size one                            # the setting that the others are compared with
    runs:
      - family: SDAR
        decoder: standard
        name: "plain B={block_length} {confidence_threshold}"
        group: "plain B={block_length}"
        options: {block_length: [8, 16], confidence_threshold: [0.8, 0.9]}     # a list is swept
        variants: {}                                    # name -> options, swept like a list; the name is {variant}

A run may have ``tasks`` of its own among those of the grid, and how they are put: ``num_fewshot``, ``chat``, ``fewshot_as_multiturn``.
A run without ``pretrained`` takes the checkpoint that ships with its family; checkpoints of networks beside the first go by their role
(``drafter: PATH``). ``preset`` is a preset of the decoder, under ``options``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import yaml

from shared.errors import UserError, unknown_name
from shared.family import Family, default_family, family_named
from shared.scripts.models import check_roles, checkpoints_of


@dataclass(frozen=True, slots=True)
class Setting:
    """One decoder with its options, and the checkpoint of every role. ``group`` is drawn as one line; ``tasks`` are those it is run on (None: all),
    ``put`` says how, where that is not as the grid does."""

    name: str
    family: str
    decoder: str
    checkpoints: Mapping[str, str]
    group: str
    preset: str | None = None
    options: dict = field(default_factory=dict)
    tasks: tuple[str, ...] | None = None
    put: dict = field(default_factory=dict)

    @property
    def checkpoint(self) -> str:
        """What its checkpoints are called."""
        return "+".join(dict.fromkeys(Path(c).name for c in self.checkpoints.values()))

    def resolved(self) -> dict:
        """Every option of the decoder, the preset's and the defaults among them."""
        decoder = family_named(self.family).decoders[self.decoder]
        below = decoder.preset(self.preset) if self.preset else {}
        return decoder.options_class.from_layers(below, self.options).to_flat()


@dataclass(frozen=True, slots=True)
class Asked:
    """A task of lm-eval and which of its figures is the accuracy: ``NAME`` or ``NAME,FILTER``; by default its first. How it is put:
    ``num_fewshot`` examples (None: the task's own), ``chat`` through the chat template, each example a turn of its own or not."""

    task: str
    metric: str | None = None
    num_fewshot: int | None = None
    chat: bool = True
    fewshot_as_multiturn: bool = False


@dataclass(frozen=True, slots=True)
class Grid:
    """``problems``: the first so many of each task (None: all). ``calibrate``: so many also with every acceptance estimator at work.
    ``replays``: of so many problems a task the traces go into the report."""

    name: str
    settings: tuple[Setting, ...]
    tasks: tuple[Asked, ...]
    about: str = ""
    baseline: str = ""
    problems: int | None = None
    batch_size: int = 32
    dtype: str = "auto"
    chat: bool = True
    num_fewshot: int | None = None
    replays: int = 2
    calibrate: int = 0

    def asked(self, setting: Setting) -> list[Asked]:
        """The tasks of a setting, as they are put to it."""
        put = {"num_fewshot": self.num_fewshot, "chat": self.chat} | setting.put
        return [replace(a, **put) for a in self.tasks if setting.tasks is None or a.task in setting.tasks]

    def only(self, pattern: str) -> Grid:
        """The settings whose name the regular expression finds, and the baseline."""
        try:
            found = {s.name for s in self.settings if re.search(pattern, s.name)}
        except re.error as error:
            raise UserError(f"only is {pattern!r}, which is no regular expression ({error})") from error
        kept = tuple(s for s in self.settings if s.name in {self.baseline, *found})
        if not found:
            raise UserError(f"only is {pattern!r}, which no setting of {self.name} matches. Allowed: a part of a name")
        return replace(self, settings=kept)


_PUT = ("num_fewshot", "chat", "fewshot_as_multiturn")
_RUN_KEYS = ("family", "decoder", "name", "group", "pretrained", "preset", "options", "variants", "tasks", *_PUT)
_GRID_KEYS = (*(f.name for f in fields(Grid) if f.name != "settings"), "runs")


def read_grid(path: str | Path) -> Grid:
    """The grid of a file; `UserError` for what cannot be."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(
            f"grid {str(path)!r} cannot be read ({' '.join(str(error).split())}). Allowed: a YAML file"
        ) from error
    if not isinstance(data, dict):
        raise UserError(f"grid {str(path)!r} holds no mapping. Allowed: see eval/grids")
    return grid_of({"name": Path(path).stem, **data})


def grid_of(data: dict) -> Grid:
    """A grid from plain data, checked: every key, every decoder, every option."""
    for key in data:
        if key not in _GRID_KEYS:
            raise unknown_name("key of a grid", str(key), _GRID_KEYS)
    settings = tuple(s for run in data.get("runs") or () for s in settings_of(run))
    tasks = tuple(Asked(**t) if isinstance(t, dict) else Asked(str(t)) for t in data.get("tasks") or ())
    if not settings or not tasks:
        raise UserError("a grid has no runs or no tasks. Allowed: at least one of each")
    grid = Grid(settings=settings, tasks=tasks, **{k: v for k, v in data.items() if k not in ("runs", "tasks")})
    seen: set[tuple[str, str, str]] = set()
    for s in settings:
        if (s.family, s.checkpoint, s.name) in seen:
            raise UserError(f"two settings of {s.family} are called {s.name!r}. Allowed: names that differ")
        seen.add((s.family, s.checkpoint, s.name))
        for task in s.tasks or ():
            if task not in (known := [a.task for a in tasks]):
                raise unknown_name("task of the grid", task, known)
    called: dict[tuple[str, str], Mapping[str, str]] = {}
    for s in settings:
        if called.setdefault((s.family, s.checkpoint), s.checkpoints) != s.checkpoints:
            raise UserError(f"two checkpoints of {s.family} are called {s.checkpoint!r}. Allowed: names that differ")
    if grid.baseline and not any(s.name == grid.baseline for s in settings):
        raise unknown_name("baseline", grid.baseline, [s.name for s in settings])
    return grid


def settings_of(run: dict) -> Iterator[Setting]:
    """The settings of one run: every combination of its swept options and variants."""
    named = run.get("family") or default_family()
    family = family_named(named)
    for key in run:
        if key not in (*_RUN_KEYS, *family.networks):
            raise unknown_name("key of a run", str(key), [*_RUN_KEYS, *family.networks])
    decoder = run.get("decoder") or next(iter(family.decoders))
    if decoder not in family.decoders:
        raise unknown_name("decoder", decoder, family.decoders)
    checkpoints = checkpoints_of_run(family, run)
    check_roles(family, decoder, checkpoints)
    options, preset = run.get("options") or {}, run.get("preset")
    swept = {k: v for k, v in options.items() if isinstance(v, list)}
    fixed = {k: v for k, v in options.items() if k not in swept}
    for (variant, more), *values in itertools.product((run.get("variants") or {"": {}}).items(), *swept.values()):
        flat = {**fixed, **dict(zip(swept, values, strict=True)), **more}
        words = {**flat, "variant": variant, "decoder": decoder, "family": named}
        name = _filled(run.get("name") or _plain_name(decoder, preset, variant, swept), words)
        group = _filled(run.get("group") or decoder, words)
        tasks, put = run.get("tasks"), {k: run[k] for k in _PUT if k in run}
        setting = Setting(name, named, decoder, checkpoints, group, preset, flat, tasks and tuple(tasks), put)
        setting.resolved()  # unknown names and impossible values are told before anything is measured
        yield setting


def checkpoints_of_run(family: Family, run: dict) -> dict[str, str]:
    """The checkpoint of every role: what the run names, by default those that ship."""
    given = {role: run[role] for role in family.networks if role in run}
    if run.get("pretrained"):
        return checkpoints_of(family, run["pretrained"], given)
    if not family.shipped:
        raise UserError(f"pretrained is missing. Allowed: a checkpoint; none ships with {family.name}")
    return family.checkpoints(next(iter(family.shipped))) | given


def _plain_name(decoder: str, preset: str | None, variant: str, swept: dict) -> str:
    """A name for a run that has none."""
    return " ".join([decoder, *filter(None, (preset, variant)), *(f"{k}={{{k}}}" for k in swept)])


def _filled(pattern: str, words: dict) -> str:
    try:
        return pattern.format(**words)
    except (KeyError, IndexError) as error:
        raise UserError(f"name {pattern!r} asks for {error}. Allowed: {', '.join(words)}") from None


def run_of_flag(text: str) -> dict:
    """``family=SDAR,decoder=ssd_policy,block_length=8/16`` as a run of a grid; values between slashes are swept."""
    pairs = {}
    for part in filter(None, text.split(",")):
        key, found, value = part.partition("=")
        if not found:
            raise UserError(f"run has {part!r}. Allowed: KEY=VALUE, separated by commas")
        pairs[key] = value
    roles = family_named(pairs.get("family") or default_family()).networks
    run: dict = {"options": {}}
    for key, value in pairs.items():
        if key in roles or key in ("family", "decoder", "name", "group", "pretrained", "preset"):
            run[key] = value
        else:
            values = [yaml.safe_load(v) for v in value.split("/")]
            run["options"][key] = values if len(values) > 1 else values[0]
    return run
