"""Compiling the kernels: one source file for three instruction sets, a few for all of them, one shared library.

``build(directory)`` compiles into a directory and returns the library's path; a packager calls it when the package is
installed. ``cached()`` does the same once per user, sources, flags and compiler.

The compiler is ``$CXX``, else c++, g++ or clang++. Nothing but a C++17 compiler and pthreads is needed.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from memopt.untrusted.ownership import open_own, own_directory

SOURCES = Path(__file__).parent / "src"
NAME = "libmemopt_kernels.so"
#: In the cache: the SHA-256 of its content is in its name.
_HASHED = "libmemopt_kernels-{}.so"

#: -ffp-contract=off: a multiplication and an addition are fused only where the source says so, because results are
#: compared with torch's operations bit for bit.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-exceptions",
    "-fno-rtti",
    "-w",
)
COMMON = (
    "api",
    "pool",
    "step",
    "passes/finite",
    "passes/means",
    "passes/row_means",
    "passes/sinkgd",
    "passes/whole",
)
#: Flags of the tables that ``api.cpp`` chooses from.
TABLES_X86 = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
}


#: Seconds between two signs of life of a compilation.
HEARTBEAT = 15.0


class BuildError(RuntimeError):
    """The kernels could not be compiled; the text says why and what to do."""


def compiler() -> list[str]:
    """The command that compiles C++. Raises :class:`BuildError` if there is none."""
    given = os.environ.get("CXX", "").split()
    for command in (given, ["c++"], ["g++"], ["clang++"]):
        if command and shutil.which(command[0]):
            return command
        if command and command is given:
            raise BuildError(f"CXX={' '.join(given)} is not a command; unset CXX or set it to a C++ compiler")
    raise BuildError("no C++ compiler was found; install one (on Debian or Ubuntu: apt install g++)")


def tables() -> dict[str, tuple[str, ...]]:
    return dict(TABLES_X86) if platform.machine() in ("x86_64", "AMD64") else {"baseline": ()}


def build(directory: str | os.PathLike[str], extra: Sequence[str] = ()) -> Path:
    """Compile into ``directory`` and return the library's path; ``extra`` flags are for sanitizers.

    The library appears under its name when it is complete, so several processes may build at once.
    Raises :class:`BuildError`.
    """
    command = compiler()
    target = Path(directory) / NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
        jobs = [
            (f"{SOURCES}/isa.cpp", f"{scratch}/{table}.o", (*flags, f"-DMEMOPT_TABLE=memopt_{table}"))
            for table, flags in tables().items()
        ]
        jobs += [(f"{SOURCES}/{name}.cpp", f"{scratch}/{Path(name).name}.o", ()) for name in COMMON]
        running = [
            subprocess.Popen(
                [*command, *FLAGS, f"-I{SOURCES}", *extra, *flags, "-c", source, "-o", out],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for source, out, flags in jobs
        ]
        # Every process is waited for before an error is raised.
        messages = [process.communicate()[1] for process in running]
        for process, message in zip(running, messages, strict=True):
            if process.returncode:
                raise BuildError(f"{' '.join(command)} could not compile the kernels: {_first_line(message)}")
        library = f"{scratch}/{NAME}"
        link = [*command, "-shared", *extra, *(out for _, out, _ in jobs), "-o", library, "-lpthread", "-lm", "-ldl"]
        linked = subprocess.run(link, capture_output=True, text=True)
        if linked.returncode:
            raise BuildError(f"{' '.join(command)} could not link the kernels: {_first_line(linked.stderr)}")
        os.replace(library, target)
    return target


def cached() -> Path:
    """The library in the user's cache, compiled if it is not there yet; :func:`verified` opens it. Raises
    :class:`BuildError`."""
    try:
        directory = cache_root() / fingerprint()
        own_directory(directory)
        for path in sorted(directory.glob(_HASHED.format("*"))):
            with suppress(BuildError):
                os.close(verified(path))
                return path
        print("memopt: compiling its CPU kernels, once, in a minute or two", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".new-") as scratch:
            with _said_to_live():
                built = build(scratch)
            built.chmod(0o700)
            target = directory / _HASHED.format(hashlib.sha256(built.read_bytes()).hexdigest())
            with open(built, "rb") as file:
                os.fsync(file.fileno())
            os.replace(built, target)
    except OSError as error:
        raise BuildError(
            f"{error.filename or 'the cache of compiled kernels'} cannot be used ({error.strerror}); set MEMOPT_CACHE "
            "to a directory of your own"
        ) from error
    return target


@contextmanager
def _said_to_live() -> Iterator[None]:
    """A line on standard error every ``HEARTBEAT`` seconds."""
    done, start = threading.Event(), time.monotonic()

    def say() -> None:
        while not done.wait(HEARTBEAT):
            print(f"memopt: still compiling, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def verified(path: Path) -> int:
    """A descriptor of a library of the cache: a file of this user's alone, with the content that was compiled. Raises
    :class:`BuildError` for any other: whoever could write there would run what they like in this process."""
    try:
        descriptor = open_own(path, os.O_RDONLY)
    except OSError as error:
        raise BuildError(f"{path} is not loaded: {error.strerror}") from error
    with open(descriptor, "rb", closefd=False) as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    if path.name != _HASHED.format(digest):
        os.close(descriptor)
        raise BuildError(f"{path} is not loaded: it is not what was compiled (its SHA-256 is {digest})")
    return descriptor


def cache_root() -> Path:
    """``$MEMOPT_CACHE``, else ``memopt`` in the user's cache directory, else, where no home can be written, a folder of
    the user's own among the temporary files. Raises OSError for one that is not the user's alone."""
    given = os.environ.get("MEMOPT_CACHE")
    if given:
        own_directory(given)
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    root = Path(base) / "memopt"
    if root.is_absolute():  # a user without a home has "~"
        with suppress(OSError):
            own_directory(root)
            return root
    root = Path(tempfile.gettempdir()) / f"memopt-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"
    with suppress(OSError):
        if not root.is_symlink():
            own_directory(root)
            return root
    private = _for_this_process()
    if not private.exists():  # somebody has tidied up
        _for_this_process.cache_clear()
        private = _for_this_process()
    return private


@cache
def _for_this_process() -> Path:
    """Somebody else has taken the name of the folder."""
    root = tempfile.mkdtemp(prefix="memopt-")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return Path(root)


def fingerprint() -> str:
    """Of sources, flags, compiler and machine: a library is never used for others."""
    command = compiler()
    version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(repr((FLAGS, tables(), command, version, platform.machine(), sys.platform)).encode())
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in (".h", ".cpp"):
            name = path.relative_to(SOURCES).as_posix()
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def _first_line(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line.lower()] or text.splitlines() or ["no message"]
    return lines[0]
