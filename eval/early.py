"""What lm-eval finds out late or with a traceback, told in one line before a model is loaded: flags, files, tasks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import lm_eval.tasks
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.tasks import TaskManager

from eval.cells import OFFLINE, TASKS
from shared.errors import UserError


def install() -> None:
    """From now on a wrong configuration is a `UserError`, and tasks are loaded, once, as soon as they are known."""
    if getattr(EvaluatorConfig.process_tasks, "ours", False):
        return
    for name in ("_configure", "load_yaml_config", "process_tasks"):
        made = EvaluatorConfig.__dict__[name]
        wrapped = in_one_line(made.__func__ if isinstance(made, staticmethod) else made)
        if name == "process_tasks":
            wrapped = with_tasks(wrapped)
        setattr(EvaluatorConfig, name, staticmethod(wrapped) if isinstance(made, staticmethod) else wrapped)
    EvaluatorConfig.process_tasks.ours = True


def in_one_line(call: Callable) -> Callable:
    """``call``, of which any error is the user's to mend."""

    @functools.wraps(call)
    def told(*arguments, **keywords):
        try:
            return call(*arguments, **keywords)
        except UserError:
            raise
        except Exception as error:
            raise UserError(" ".join(f"{error or type(error).__name__}".split())[:400]) from error

    return told


def with_tasks(process_tasks: Callable) -> Callable:
    """``process_tasks``, after which the tasks are loaded and may be run."""

    @functools.wraps(process_tasks)
    def process(config: EvaluatorConfig, metadata: dict | None = None) -> TaskManager:
        with index_of_ours(config):
            manager = process_tasks(config, metadata)
        loaded = in_one_line(manager.load)(config.tasks)
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) and not config.confirm_run_unsafe_code:
                raise UserError(
                    f"task {name!r} runs model-written code. Allowed: --confirm_run_unsafe_code, other tasks"
                )
        manager.load = lambda *asked, **how: loaded  # lm-eval's own call, for the same tasks
        return manager

    return process


@contextlib.contextmanager
def index_of_ours(config: EvaluatorConfig) -> Iterator[None]:
    """Where all tasks are ours, lm-eval looks through their folder alone: its own holds 14,000 files."""
    names = config.tasks.split(",") if isinstance(config.tasks, str) else config.tasks or [""]
    whole = lm_eval.tasks.TaskManager
    if config.include_path == [str(TASKS)] and all(name in OFFLINE for name in names):
        lm_eval.tasks.TaskManager = functools.partial(whole, include_defaults=False)
    try:
        yield
    finally:
        lm_eval.tasks.TaskManager = whole
