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

A run may have ``tasks`` of its own among those of the grid, and how they are put: ``num_fewshot``, ``chat``,
``fewshot_as_multiturn``. A run without ``pretrained`` takes the checkpoint that ships with its family; checkpoints of
networks beside the first go by their role (``drafter: PATH``). ``preset`` is one of the decoder, under ``options``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType

import yaml

from shared.errors import UserError, unknown_name
from shared.family import Family, default_family, family_named
from shared.options import coerce
from shared.scripts.models import check_roles, checkpoints_of


@dataclass(frozen=True, slots=True)
class Setting:
    """One decoder with its options, and the checkpoint of every role. ``group`` is drawn as one line;
    ``tasks`` are those it is run on (None: all),
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

    def resolved(self, task: Mapping = MappingProxyType({})) -> dict:
        """Every option of the decoder, the preset's and the defaults among them, and what a ``task`` sets besides."""
        decoder = family_named(self.family).decoders[self.decoder]
        below = decoder.preset(self.preset) if self.preset else {}
        return decoder.options_class.from_layers(below, task, self.options).to_flat()


@dataclass(frozen=True, slots=True)
class Asked:
    """A task of lm-eval and which of its figures is the accuracy: ``NAME`` or ``NAME,FILTER``; by default its first.
    How it is put: ``num_fewshot`` examples (None: the task's own), ``chat`` through the chat template, each example a
    turn of its own or not."""

    task: str
    metric: str | None = None
    num_fewshot: int | None = None
    chat: bool = True
    fewshot_as_multiturn: bool = False


@dataclass(frozen=True, slots=True)
class Grid:
    """``problems``: the first so many of each task (None: all). ``calibrate``: so many also with every acceptance
    estimator at work. ``replays``: of so many problems a task the traces go into the report."""

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


_PUT = {"num_fewshot": int, "chat": bool, "fewshot_as_multiturn": bool}
_RUN_KEYS = ("family", "decoder", "name", "group", "pretrained", "preset", "options", "variants", "tasks", *_PUT)
_RUN_KINDS = {k: {"options": dict, "variants": dict, "tasks": list}.get(k, _PUT.get(k, str)) for k in _RUN_KEYS}
_KIND_NAMES = {dict: "a mapping", list: "a list", str: "text", int: "a whole number", bool: "true or false"}
# Kind and least value of what is said of a whole grid.
_FIELDS = {"name": (str, None), "about": (str, None), "baseline": (str, None), "problems": (int, 1),
           "batch_size": (int, 1), "dtype": (str, None), "chat": (bool, None), "num_fewshot": (int, 0),
           "replays": (int, 0), "calibrate": (int, 0)}  # fmt: skip
_GRID_KEYS = (*(f.name for f in fields(Grid) if f.name != "settings"), "runs")


def read_grid(path: str | Path) -> Grid:
    """The grid of a file; `UserError` for what cannot be."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
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
    data = {"name": "comparison"} | data
    data |= {key: checked_field(key, data[key]) for key in _FIELDS if key in data}
    runs, asked = (items_of(key, data.get(key)) for key in ("runs", "tasks"))
    settings = tuple(s for run in runs for s in settings_of(run))
    tasks = tuple(map(asked_of, asked))
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


def checked_field(key: str, value: object) -> object:
    """A plain value of a grid, of its kind and in its range."""
    kind, least = _FIELDS[key]
    if value is None and key in ("problems", "num_fewshot"):
        return None
    value = coerce(key, value, kind)
    if least is not None and value < least:
        raise UserError(f"{key} is {value}. Allowed: at least {least}")
    return value


def items_of(key: str, value: object) -> list:
    if value is not None and not isinstance(value, list):
        raise UserError(f"{key} is {value!r}. Allowed: a list")
    return value or []


def asked_of(task: object) -> Asked:
    """A task of a grid: its name, or a mapping of ``task`` and ``metric``."""
    fields_of = task if isinstance(task, dict) else {"task": task}
    for key, value in fields_of.items():
        if key not in ("task", "metric"):
            raise unknown_name("key of a task", str(key), ("task", "metric"))
        if not isinstance(value, str):
            raise UserError(f"{key} of a task is {value!r}. Allowed: a name")
    if "task" not in fields_of:
        raise UserError(f"a task is {task!r}. Allowed: a name, or task: NAME, metric: NAME")
    return Asked(**fields_of)


def settings_of(run: dict) -> Iterator[Setting]:
    """The settings of one run: every combination of its swept options and variants."""
    if not isinstance(run, dict):
        raise UserError(f"a run is {run!r}. Allowed: a mapping, see eval/grids")
    for key, kind in _RUN_KINDS.items():
        if run.get(key) is not None and not isinstance(run[key], kind):
            raise UserError(f"{key} of a run is {run[key]!r}. Allowed: {_KIND_NAMES[kind]}")
    for name, more in (run.get("variants") or {}).items():
        if not isinstance(more, dict):
            raise UserError(f"variant {name!r} is {more!r}. Allowed: a mapping of options")
    named = run.get("family") or default_family()
    family = family_named(named)
    for key in run:
        if key not in (*_RUN_KEYS, *family.networks):
            raise unknown_name("key of a run", str(key), [*_RUN_KEYS, *family.networks])
        if key in family.networks and not isinstance(run[key], str):
            raise UserError(f"{key} of a run is {run[key]!r}. Allowed: a checkpoint")
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
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"name {pattern!r} cannot be filled in ({error}). Allowed: text with {{OPTION}} in it"
        ) from None


def value_of(key: str, word: str) -> object:
    """A word of a command line as YAML reads it."""
    try:
        return yaml.safe_load(word)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{key} of a run is {word!r}. Allowed: a number, a word, true or false") from error


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
            values = [value_of(key, v) for v in value.split("/")]
            run["options"][key] = values if len(values) > 1 else values[0]
    return run
