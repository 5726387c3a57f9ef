"""Is there room for what is about to be allocated? Asked before it is: a CPU promises memory that it does not have, and then the process is killed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from shared.errors import UserError

SMALL = 1 << 26  # bytes that nobody asks about


def check_room(what: str, needed: int, device: torch.device | str, allowed: str) -> None:
    """Raise `UserError` unless ``needed`` bytes for ``what`` are free on ``device``."""
    device = torch.device(device)
    if needed < SMALL or device.type == "meta":
        return
    free = free_bytes(device)
    if free is not None and needed > free:
        raise UserError(
            f"{what} needs {needed} bytes ({_short(needed)}), {device} has {free} ({_short(free)}) free. Allowed: {allowed}"
        )


def free_bytes(device: torch.device) -> int | None:
    """What can be allocated there; None where nobody says."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return min((free for free in (_of_machine(), _of_group()) if free is not None), default=None)


def _of_machine() -> int | None:
    """`MemAvailable` of Linux."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _of_group(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's limit leaves, file caches counted as free."""
    try:
        limit = int((root / "memory.max").read_text(encoding="ascii"))
        used = int((root / "memory.current").read_text(encoding="ascii"))
        cached = dict(line.split() for line in (root / "memory.stat").read_text(encoding="ascii").splitlines())
        return limit - used + int(cached.get("inactive_file", 0))
    except (OSError, ValueError):  # no such limit
        return None


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of all of them, each counted once."""
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())


def _short(count: int) -> str:
    """Bytes as people say them."""
    return f"{count / 1e9:.3g} GB"
