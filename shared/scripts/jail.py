"""The child process of `shared.scripts.sandbox`: confines itself, then runs the program on its standard input. Standard library only.

python -I jail.py SECONDS MEMORY_MB FILES_MB FOLDER < program.py

FOLDER, which must be there, is where the program's own file system in memory appears; nothing is written to the real one.

Exit codes: 77 the program reached its end, 1 it did not, 2 out of time, 3 a limit could not be set, 4 the interpreter died. For 3 and 4 the reason is the
last line on standard error.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import resource
import signal
import struct
import sys
import time

PASSED, FAILED, LATE, REFUSED, DIED = 77, 1, 2, 3, 4
RAISED = 78  # of the process inside, for FAILED: a library that gives up may exit with 1
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 2, 4, 0x4000, 0x40000
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ATTR_RDONLY = 442, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 38, 22
HIDDEN = ("/dev", "/proc", "/sys", "/run")

# Architecture -> (AUDIT_ARCH, system calls refused). From the kernel's tables; numbers from 424 on are common to all.
COMMON = (425, 428, 429, 430, 431, 432, 433, 434, 435, 438, 442, 424)  # io_uring, mounts, pidfd, clone3
CALLS = {
    # shmget shmat (memory that no limit counts) socket socketpair clone fork vfork kill ptrace pivot_root chroot mount umount2 tkill tgkill unshare setns process_vm_* bpf keyctl, queueinfo, execve
    "x86_64": (0xC000003E, (29, 30, 41, 53, 56, 57, 58, 62, 101, 155, 161, 165, 166, 200, 234, 272, 308, 310, 311, 321, 250, 129, 297, 59, 322, *COMMON)),
    "aarch64": (0xC00000B7, (194, 196, 198, 199, 220, 129, 117, 41, 51, 40, 39, 130, 131, 97, 268, 270, 271, 280, 219, 138, 240, 221, 281, *COMMON)),
}  # fmt: skip

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def enter_namespaces() -> None:
    """New user, process, network, mount and IPC namespaces; the user is nobody in particular there."""
    user, group = os.geteuid(), os.getegid()
    check(libc.unshare(NEWUSER | NEWPID | NEWNET | NEWNS | NEWIPC), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {user} 1"), ("gid_map", f"65534 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def mount_attributes(path: str, flags: int, *, add: int = 0, remove: int = 0) -> None:
    """mount_setattr(2)."""
    wanted = struct.pack("QQQQ", add, remove, 0, 0)
    check(libc.syscall(MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, wanted, len(wanted)), f"mount_setattr {path}")


def confine_files(folder: str, size_mb: int) -> None:
    """Everything read-only, devices and kernel files hidden, and a writable file system in memory at ``folder``."""
    check(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "mount /")
    options = f"size={size_mb}m,nr_inodes=1024".encode()
    for path in (*(p for p in HIDDEN if os.path.isdir(p)), folder):
        check(libc.mount(b"tmpfs", path.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options), f"mount {path}")
    mount_attributes("/", AT_RECURSIVE, add=ATTR_RDONLY)
    mount_attributes(folder, 0, remove=ATTR_RDONLY)
    os.chdir(folder)
    os.environ.update(HOME=folder, TMPDIR=folder)


def limit(seconds: float, memory_mb: int, files_mb: int) -> None:
    cpu = math.ceil(seconds)
    for what, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_FSIZE, files_mb << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (value, value))


def filter_calls() -> None:
    """A seccomp filter: the calls of `CALLS` fail with EPERM, another architecture's kill the process. Then no capability is left."""
    if platform.machine() not in CALLS:
        raise OSError(f"no system-call table for {platform.machine()}")
    arch, refused = CALLS[platform.machine()]
    load, equal, above, give = 0x20, 0x15, 0x35, 0x06
    code = [(load, 0, 0, 4), (equal, 1, 0, arch), (give, 0, 0, 0x80000000), (load, 0, 0, 0)]
    code += [(above, 0, 1, 0x40000000), (give, 0, 0, 0x50001)]  # x32 numbers
    for number in refused:
        code += [(equal, 0, 1, number), (give, 0, 0, 0x50001)]
    code.append((give, 0, 0, 0x7FFF0000))
    body = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(body)))
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    check(libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("IIIIII", *[0] * 6)), "capset")
    check(libc.prctl(PR_SET_SECCOMP, 2, program, 0, 0), "seccomp")


def inside(program: bytes, folder: str, limits: tuple[float, int, int], ready: int) -> None:
    """The first process of the new namespaces. Never returns."""
    try:
        check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "pdeathsig")
        null = os.open("/dev/null", os.O_RDWR)
        confine_files(folder, limits[2])
        limit(*limits)
        filter_calls()
        os.write(ready, b"1")
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.closerange(3, 64)
    except BaseException as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(REFUSED)
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    except BaseException:
        os._exit(RAISED)
    os._exit(PASSED)


def outcome(code: int) -> int:
    """Our exit code for that of the process inside, which is negative where a signal ended it."""
    if code == -signal.SIGXCPU:
        return LATE
    if code in (PASSED, RAISED):
        return PASSED if code == PASSED else FAILED
    names = {number.value: number.name for number in signal.Signals}  # signals of real-time have none
    print(names.get(-code, f"signal {-code}") if code < 0 else f"exit code {code}", file=sys.stderr)
    return DIED


def main() -> int:
    limits, folder = (float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])), sys.argv[4]
    program = sys.stdin.buffer.read()
    try:
        enter_namespaces()
    except OSError as error:
        print(error, file=sys.stderr)
        return REFUSED
    told, ready = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(told)
        inside(program, folder, limits, ready)
    os.close(ready)
    confined = os.read(told, 1) == b"1"
    until = time.monotonic() + limits[0]
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done or time.monotonic() > until:
            break
        time.sleep(0.005)
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return LATE
    if not confined:
        return REFUSED
    return outcome(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    sys.exit(main())
