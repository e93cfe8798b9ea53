"""Compiling the kernels: one source file for three instruction sets, a few for all of them, one shared library.

``build(directory)`` compiles into a directory and returns the library's path; a packager calls it when the package is
installed. ``cached()`` does the same once per user, sources, flags and compiler.

The compiler is ``$CXX``, else c++, g++ or clang++. Nothing but a C++17 compiler and pthreads is needed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
NAME = "libmemopt_kernels.so"

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
COMMON = ("api", "step", "whole", "means", "row_means", "finite", "pool")
#: Flags of the tables that ``api.cpp`` chooses from.
TABLES_X86 = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
}


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
        jobs += [(f"{SOURCES}/{name}.cpp", f"{scratch}/{name}.o", ()) for name in COMMON]
        running = [
            subprocess.Popen(
                [*command, *FLAGS, *extra, *flags, "-c", source, "-o", out],
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
    """The library in the user's cache, compiled if it is not there yet. Raises :class:`BuildError`."""
    directory = cache_root() / fingerprint()
    library = directory / NAME
    if library.exists():
        return library
    print("memopt: compiling its CPU kernels, once, in about a minute", file=sys.stderr, flush=True)
    try:
        return build(directory)
    except OSError as error:
        raise BuildError(
            f"{directory} cannot be written ({error.strerror}); set MEMOPT_CACHE to a directory that can be"
        ) from error


def cache_root() -> Path:
    """``$MEMOPT_CACHE``, else ``memopt`` in the user's cache directory."""
    given = os.environ.get("MEMOPT_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "memopt"


def fingerprint() -> str:
    """Of sources, flags, compiler and machine: a library is never used for others."""
    command = compiler()
    version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(repr((FLAGS, tables(), command, version, platform.machine(), sys.platform)).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def _first_line(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line.lower()] or text.splitlines() or ["no message"]
    return lines[0]
