import sys
from pathlib import Path

import shared

# `python -m` looks first into the folder it is run from.
_FOUND = next(iter(getattr(shared, "__path__", [shared.__file__])))
if Path(_FOUND) != Path(__file__).parents[1] / "shared":
    sys.exit(
        f"error: shared is {_FOUND}, found before this repository's. Allowed: run from another folder, or rename it"
    )
