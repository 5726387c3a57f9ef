"""Hostile programs in the jail: each fails, and none leaves a mark."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from shared.errors import UserError
from shared.scripts import jail, sandbox
from shared.scripts.sandbox import Limits, run


@pytest.fixture(autouse=True, scope="module")
def confinable():
    """Where the kernel gives no namespaces, the runner must refuse; that is then all there is to test."""
    try:
        run("pass")
    except UserError as error:
        pytest.skip(f"no confinement on this machine: {error}")


def test_a_good_program_passes_and_a_bad_one_fails():
    assert run("assert 1 + 1 == 2").passed
    assert run("import math, random, json, re, collections\nassert math.sqrt(4) == 2").passed
    for bad in ("assert 1 + 1 == 3", "def f(:", "raise SystemExit(0)", "import os\nos._exit(0)", "\x00", "1/0"):
        assert not run(bad).passed, bad


def test_exit_code_of_success_cannot_be_hit_by_leaving_early_with_zero():
    assert run("import sys\nsys.exit(0)").reason == "failed"


@pytest.mark.parametrize(
    ("program", "how"),
    [
        ("import os\nos._exit(0)", "exit code 0"),
        ("import os\nos._exit(1)", "exit code 1"),
        ("import ctypes\nctypes.string_at(0)", "SIGSEGV"),
    ],
)
def test_an_interpreter_that_died_is_no_failed_test(program, how):
    verdict = run(program)
    assert (verdict.passed, verdict.reason, verdict.how) == (False, "died", how)
    assert run("assert False") == sandbox.Verdict(False, "failed")


def test_numpy_works_inside():
    program = "import numpy as np\nassert np.allclose(np.linalg.inv(np.eye(200) * 2) @ np.ones(200), {value})"
    assert run(program.format(value=0.5)).reason == "passed"
    assert run(program.format(value=0.4)).reason == "failed"


def test_time_on_the_processor_is_time():
    """The limit on processor time may be met before that on wall time."""
    from shared.scripts import jail

    assert jail.outcome(-signal.SIGXCPU) == jail.LATE
    assert [jail.outcome(code) for code in (77, 78, 1, 0, -11)] == [jail.PASSED, jail.FAILED, *[jail.DIED] * 3]


def test_endless_loops_end():
    began = time.monotonic()
    assert run("while True: pass", Limits(seconds=0.5)).reason == "timed out"
    assert run("import time\ntime.sleep(60)", Limits(seconds=0.5)).reason == "timed out"
    assert time.monotonic() - began < 8


def test_no_new_processes():
    for call in (
        "os.fork()",
        "subprocess.run(['true'])",
        "threading.Thread(target=print).start()",
        "os.execv('/bin/sh', ['sh'])",
    ):
        assert run(f"import os, subprocess, threading\nwhile True:\n    {call}", Limits(seconds=3)).reason == "failed"


def test_memory_is_limited():
    assert run("x = bytearray(100 << 30)").reason == "failed"
    assert run("x = []\nwhile True: x.append(bytearray(1 << 20))").reason == "failed"
    # Shared memory of System V, which no limit of a process counts.
    assert not run("import ctypes\nassert ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0").passed


def test_files_outside_cannot_be_written(tmp_path):
    mark = tmp_path / "mark"
    mark.write_text("as it was")
    for path in (
        mark,
        tmp_path / "new",
        "/tmp/sandbox-escape",
        os.path.expanduser("~/sandbox-escape"),
        sandbox.__file__,
    ):
        assert not run(f"open({str(path)!r}, 'w').write('x')").passed
    assert not run(f"import os\nos.unlink({str(mark)!r})").passed
    assert mark.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [mark]
    assert not os.path.exists("/tmp/sandbox-escape")


def test_its_own_folder_is_writable_and_small():
    assert run("open('note', 'w').write('x')\nassert open('note').read() == 'x'").passed
    assert not run("for k in range(40): open(str(k), 'wb').write(bytes(1 << 20))").passed


def test_devices_and_kernel_files_are_hidden():
    assert run("import os\nassert os.listdir('/dev') == os.listdir('/proc') == os.listdir('/sys') == []").passed


def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        assert not run(f"import socket\nsocket.create_connection({address!r}, 1)").passed
    assert not run("import socket\nsocket.socket(socket.AF_UNIX)").passed


def test_nobody_outside_can_be_killed():
    parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        for victim in (parent.pid, os.getpid(), -1):
            run(f"import os, signal\nos.kill({victim}, signal.SIGKILL)")
        assert not run("import os\nos.kill(os.getppid(), 9)").passed
        assert parent.poll() is None
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()


def test_the_jail_cannot_be_undone():
    undo = "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.{call} == 0"
    for call in (
        "umount2(b'/proc', 2)",
        "unshare(0x10000000)",
        "mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None)",
        "chroot(b'/')",
    ):
        assert not run(undo.format(call=call)).passed
    assert run("import ctypes\nassert ctypes.CDLL(None).getuid() == 65534").passed


def test_refuses_where_it_cannot_confine(monkeypatch, tmp_path):
    broken = tmp_path / "jail.py"
    broken.write_text("import sys\nprint('unshare: Operation not permitted', file=sys.stderr)\nsys.exit(3)\n")
    monkeypatch.setattr(sandbox, "_JAIL", broken)
    with pytest.raises(UserError, match="cannot be confined here: unshare: Operation not permitted"):
        run("pass")


def test_the_jail_itself_refuses_without_namespaces(monkeypatch, capsys, tmp_path):
    from shared.scripts import jail

    monkeypatch.setattr(jail.libc, "unshare", lambda flags: -1, raising=False)
    monkeypatch.setattr(sys, "argv", ["jail.py", "1", "512", "16", str(tmp_path)])
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    assert jail.main() == jail.REFUSED
    assert "unshare" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="needs root to become a plain user")
def test_as_a_plain_user():
    """The jail confines a plain user's programs too. The interpreter must be one that user can read."""
    python = "/usr/bin/python3"
    if not os.access(python, os.X_OK):
        pytest.skip("no interpreter outside root's own folders")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own stand in folders that are root's alone
        Path(folder).chmod(0o755)
        check_plain_user(python, Path(folder))


def check_plain_user(python: str, folder: Path) -> None:
    jail_file = folder / "jail.py"
    jail_file.write_text((sandbox._JAIL).read_text())

    def code(program: str) -> int:
        seconds = "1" if program.startswith("while") else "10"  # a busy machine is slow to start an interpreter
        call = [python, "-I", str(jail_file), seconds, "1024", "16", str(folder)]
        done = subprocess.run(
            call, input=program.encode(), capture_output=True, user=65534, group=65534, extra_groups=[]
        )
        return done.returncode

    if code("pass") == 3:
        pytest.skip("this kernel gives plain users no namespaces")
    assert code("assert True") == 77
    for hostile in ("while True: pass", "import os\nwhile True: os.fork()", "x = bytearray(100 << 30)", "import socket\nsocket.socket()",
                    "import os\nos.kill(os.getppid(), 9)", "open('/tmp/sandbox-escape', 'w')"):  # fmt: skip
        assert code(hostile) in (1, 2, 4), hostile
    assert not os.path.exists("/tmp/sandbox-escape")


def test_a_signal_without_a_name_is_told_by_its_number(capsys):
    assert jail.outcome(-40) == jail.DIED
    assert capsys.readouterr().err.strip() == "signal 40"
    assert jail.outcome(-11) == jail.DIED
    assert capsys.readouterr().err.strip() == "SIGSEGV"
