"""The one exception that means "the user can mend this": scripts print it as a single line and exit with code 2."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """Bad input. The message names the field, the value and what is allowed."""


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> UserError:
    """An error for a name that is not among ``allowed``, with the nearest ones suggested."""
    allowed = list(dict.fromkeys(allowed))
    near = difflib.get_close_matches(name, allowed, n=2, cutoff=0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    return UserError(f"unknown {kind} {name!r}{hint} Allowed: {', '.join(allowed)}")


def run_main(main: Callable[[], None]) -> None:
    """Run a program's main; a `UserError` becomes one line on standard error and exit code 2."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read us has enough, as `head` does
        end_quietly()
    except (UserError, FloatingPointError) as error:  # the latter: weights that are not finite
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def end_quietly() -> None:
    """Leave after a broken pipe, as the signal for it would: what Python still wants to print goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)
