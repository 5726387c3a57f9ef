"""Where the shipped checkpoint lies."""

from pathlib import Path

TINY = Path(__file__).parents[2] / "SDAR" / "tiny"
