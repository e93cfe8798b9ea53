"""A process that is killed at its n-th system call: ptrace through ctypes, on Linux, without anything to install.

The child is forked, asks to be traced and stops; from then on it stops at every system call of every thread. Those that
change a file system are counted. At the n-th the process is killed before the kernel executes it; with ``torn``, a
write is first executed for half of its bytes. What is on the disk between two calls, and in the middle of a write, is
what a kill at that moment leaves.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import time
from collections import Counter
from collections.abc import Callable, Container
from typing import NamedTuple

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_LIBC.ptrace.restype = ctypes.c_long
_TRACEME, _POKEUSER, _SYSCALL, _SETOPTIONS, _SYSCALL_INFO = 0, 6, 24, 0x4200, 0x420E
#: Mark stops at calls, follow threads and children, and end them with the tracer.
_OPTIONS = 1 | 2 | 4 | 8 | 0x100000
_WALL = 0x40000000
_X86 = {
    1: "write", 18: "pwrite64", 20: "writev", 296: "pwritev", 328: "pwritev2", 326: "copy_file_range", 40: "sendfile",
    2: "open", 85: "creat", 257: "openat", 76: "truncate", 77: "ftruncate", 285: "fallocate", 26: "msync",
    74: "fsync", 75: "fdatasync", 277: "sync_file_range", 82: "rename", 264: "renameat", 316: "renameat2",
    86: "link", 265: "linkat", 88: "symlink", 266: "symlinkat", 87: "unlink", 263: "unlinkat",
    83: "mkdir", 258: "mkdirat", 84: "rmdir", 90: "chmod", 91: "fchmod", 268: "fchmodat", 73: "flock",
}  # fmt: skip
#: Where the third argument of a call is in the registers of x86-64.
_RDX = 96
_GETPPID = 110
_WRITES = ("write", "pwrite64")


class Trace(NamedTuple):
    """``calls`` that change a file system, by name; ``status`` as of waitpid; ``last`` is the call it was killed at."""

    calls: Counter[str]
    status: int
    last: str


def available() -> str | None:
    """Why this cannot be done here, or None."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "system calls are traced on Linux on x86-64"
    trace = killed_at(lambda: os.close(os.open(os.devnull, os.O_WRONLY)), 0)
    return None if trace.calls["openat"] else "ptrace is not allowed here"


def begin(work: Callable[[], None]) -> int:
    """Fork a child that stops before ``work``, traced."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        if _LIBC.ptrace(_SETOPTIONS, child, None, _OPTIONS):
            os.kill(child, signal.SIGKILL)
        return child
    code = 1
    try:
        if _LIBC.ptrace(_TRACEME, 0, None, None):
            os._exit(2)
        os.kill(os.getpid(), signal.SIGSTOP)
        work()
        code = 0
    except BaseException as error:
        if os.environ.get("SHOW"):
            print(repr(error))
    finally:
        os._exit(code)


def wait(child: int, seconds: float) -> int:
    """The exit code of a child that is not traced; -1 if it has not ended by then, and has been killed."""
    end = time.monotonic() + seconds
    while child not in _ENDED and time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            _ENDED[child] = status
        time.sleep(0.005)
    if child not in _ENDED:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return -1
    return os.waitstatus_to_exitcode(_ENDED.pop(child)) & 0xFF


#: Children that are not traced and ended while another was followed.
_ENDED: dict[int, int] = {}


def follow(child: int, number: int, torn: bool = False, others: Container[int] = (), marked: bool = False) -> Trace:
    """Let the child run, and kill it at call ``number`` (from 1; 0 lets it end). ``others`` are not traced.
    ``marked``: count from where the child calls :func:`mark`."""
    calls: Counter[str] = Counter()
    info = ctypes.create_string_buffer(88)
    torn_by, last, status = 0, "", 0
    counting = not marked
    _LIBC.ptrace(_SYSCALL, child, None, None)
    while True:
        try:
            who, status = os.waitpid(-1, _WALL)
        except ChildProcessError:
            return Trace(calls, status, last)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if who == child:
                return Trace(calls, status, last)
            if who in others:
                _ENDED[who] = status
            continue
        pass_on = 0
        if os.WSTOPSIG(status) == signal.SIGTRAP | 0x80:
            _LIBC.ptrace(_SYSCALL_INFO, who, 88, info)
            if info.raw[0] == 1 and int.from_bytes(info.raw[24:32], "little") == _GETPPID:
                counting = True
            name = _changes(info.raw) if info.raw[0] == 1 and counting else None
            if info.raw[0] == 2 and torn_by == who:
                os.kill(child, signal.SIGKILL)
            elif name is not None:
                calls[name] += 1
                if calls.total() == number:
                    last = name
                    if torn and name in _WRITES:
                        torn_by = who
                        half = int.from_bytes(info.raw[48:56], "little") // 2
                        _LIBC.ptrace(_POKEUSER, who, _RDX, half)
                    else:
                        os.kill(child, signal.SIGKILL)
        elif os.WSTOPSIG(status) not in (signal.SIGTRAP, signal.SIGSTOP):
            pass_on = os.WSTOPSIG(status)
        _LIBC.ptrace(_SYSCALL, who, None, pass_on)


def mark() -> None:
    """Calls are counted from here."""
    os.getppid()


def killed_at(work: Callable[[], None], number: int, torn: bool = False) -> Trace:
    return follow(begin(work), number, torn)


def _changes(info: bytes) -> str | None:
    """The name of the call, if it is one that can change a file system."""
    name = _X86.get(int.from_bytes(info[24:32], "little"))
    flags = {"open": 40, "openat": 48}.get(name or "")
    if flags is not None:
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        return name if int.from_bytes(info[flags : flags + 8], "little") & writes else None
    if name in ("write", "writev") and int.from_bytes(info[32:40], "little") < 3:
        return None
    return name
