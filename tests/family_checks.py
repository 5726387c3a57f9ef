"""The standard of proof every family passes. A family's tests call these; nothing here knows a family."""

from __future__ import annotations

import os
from pathlib import Path

HERE = Path(__file__).parent


def golden_folder(family: str) -> Path:
    """Recorded behaviour of ``family``. ``GOLDEN_DIR`` overrides the parent folder; missing data is a failure, not a skip."""
    folder = Path(os.environ.get("GOLDEN_DIR", HERE / "golden")) / family
    if not (folder / "decode.json").is_file():
        raise FileNotFoundError(f"golden data of {family} is missing: {folder / 'decode.json'}")
    return folder
