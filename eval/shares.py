"""Fewer documents than processes: lm-eval wants one of every task in each, so a process without one gets a stand-in.

A stand-in is not decoded."""

from __future__ import annotations

import functools

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task


def install() -> None:
    """From now on a process without a document of a task takes the first one as a stand-in. lm-eval does not say so."""
    build = Task.build_all_requests
    if getattr(build, "ours", False):
        return

    @functools.wraps(build)
    def build_all_requests(self, *, limit=None, samples=None, rank=0, world_size=1, **more):
        mine = self.doc_iterator(rank=rank, limit=limit, samples=samples, world_size=world_size)
        if rank == 0 or next(iter(mine), None) is not None:
            return build(self, limit=limit, samples=samples, rank=rank, world_size=world_size, **more)
        build(self, limit=1, samples=samples, rank=0, world_size=1, **more)
        for instance in self.instances:
            instance.stand_in = True
        return None

    build_all_requests.ours = True
    Task.build_all_requests = build_all_requests


def is_stand_in(request: Instance) -> bool:
    return getattr(request, "stand_in", False)


def filled(parts: list) -> list:
    """What the processes tell of each task, as lists by metric: empty where a process has had no document."""
    for task in {task for part in parts for task in part}:
        told = [part[task] for part in parts if isinstance(part.get(task), dict)]
        for metric in {metric for found in told for metric in found}:
            for found in told:
                found.setdefault(metric, [])
    return parts
