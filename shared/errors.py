"""The one exception that means "the user can mend this": scripts print it as a single line and exit with code 2."""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
import types
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """Bad input. The message names the field, the value and what is allowed."""


class ToldElsewhere(UserError):
    """The same in a process beside the one that says it."""


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> UserError:
    """An error for a name that is not among ``allowed``, with the nearest ones suggested."""
    name, allowed = str(name), list(dict.fromkeys(allowed))
    near = difflib.get_close_matches(name, allowed, n=2, cutoff=0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    return UserError(f"unknown {kind} {name!r}{hint} Allowed: {', '.join(allowed)}")


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str):
        raise UserError(message)


def end_on_interrupt() -> None:
    """From here to `run_main`, Ctrl-C ends the program at once: exit code 130 and no traceback. For the first lines of a program, before its imports."""
    signal.signal(signal.SIGINT, _end)


def _end(*_) -> None:
    os._exit(130)


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    """Ctrl-C while `run_main` is at work. Amid an import nothing is raised: C code would swallow it, other packages would wrap it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _end()
        frame = frame.f_back
    raise KeyboardInterrupt


def run_main(main: Callable[[], None]) -> None:
    """Run a program's main; what the user can mend becomes one line on standard error and exit code 2, Ctrl-C exit code 130.

    A character that the terminal cannot show is replaced.
    """
    program = signal.getsignal(signal.SIGINT) is _end
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        if program:
            signal.signal(signal.SIGINT, _interrupt)
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read us has enough, as `head` does
        end_quietly()
    except ToldElsewhere:
        sys.exit(2)
    except (UserError, FloatingPointError) as error:  # the latter: weights that are not finite
        _fail(str(error))
    except OSError as error:  # a full disk, a file that cannot be read
        _fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part is not None))
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        _fail(f"out of memory ({error}). Allowed: fewer texts at a time, shorter ones, or a smaller checkpoint")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if program:
            end_on_interrupt()


def _out_of_memory(error: Exception) -> bool:
    """Also as torch says it, of a GPU and of a CPU."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)


def _fail(message: str) -> None:
    """One line and exit code 2. What standard output cannot take, because its disk is full, is not tried again."""
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(2)


def end_quietly() -> None:
    """Leave after a broken pipe, as the signal for it would: what Python still wants to print goes nowhere."""
    _discard_output()
    sys.exit(141)


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
