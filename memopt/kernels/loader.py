"""Finding and loading the kernels, once per process."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import NamedTuple

from memopt.kernels import abi
from memopt.kernels.build import NAME, BuildError, cached, verified

#: Where a build at installation leaves the library.
INSTALLED = Path(__file__).parent / NAME


class Library(NamedTuple):
    handle: ctypes.CDLL
    path: Path
    isa: str  # the instruction set that is used
    index: int  # type: ignore[assignment]  # its number in the library


class Missing(NamedTuple):
    reason: str


_loaded: Library | Missing | None = None


def library() -> Library | None:
    """The kernels, or None; :func:`missing` says why. The first call may compile them, which takes a minute or two."""
    found = _find()
    return found if isinstance(found, Library) else None


def missing() -> str:
    """Why there are no kernels; empty if there are."""
    found = _find()
    return found.reason if isinstance(found, Missing) else ""


def _find() -> Library | Missing:
    global _loaded
    if _loaded is None:
        _loaded = _load()
    return _loaded


def _load() -> Library | Missing:
    if os.environ.get("MEMOPT_KERNELS", "").lower() in ("off", "0", "no"):
        return Missing("MEMOPT_KERNELS=off turned them off; unset it to use them")
    errors = []
    try:
        if INSTALLED.exists():
            return open_library(INSTALLED)
    except (OSError, BuildError) as error:
        errors.append(f"{INSTALLED}: {error}")
    try:
        path = cached()
        descriptor = verified(path)
        try:
            # What was verified is what is loaded, whatever becomes of its name meanwhile.
            same = Path(f"/proc/self/fd/{descriptor}")
            return open_library(same if same.exists() else path)._replace(path=path)
        finally:
            os.close(descriptor)
    except (OSError, BuildError) as error:
        errors.append(str(error))
    return Missing("; ".join(errors))


def open_library(path: Path) -> Library:
    """Load and check a library. Raises OSError, or :class:`BuildError` if it was built from other sources."""
    handle = ctypes.CDLL(str(path))
    handle.memopt_abi_version.restype = ctypes.c_int32
    sizes = [handle.memopt_struct_size(i) for i in range(len(abi.STRUCTS))]
    if handle.memopt_abi_version() != abi.VERSION or sizes != [ctypes.sizeof(s) for s in abi.STRUCTS]:
        raise BuildError("the library was built from another version of memopt; reinstall the package")
    handle.memopt_isa_name.restype = ctypes.c_char_p
    handle.memopt_step.restype = ctypes.c_int32
    handle.memopt_step.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_uint32,
        ctypes.c_int32,
        ctypes.c_int32,
        abi.TotalCallback,
        ctypes.c_int32,
    ]
    handle.memopt_look.restype = ctypes.c_int32
    handle.memopt_look.argtypes = [ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_int32] * 3]
    names = [handle.memopt_isa_name(i).decode().removeprefix("memopt_") for i in range(handle.memopt_isa_count())]
    asked = os.environ.get("MEMOPT_KERNELS", "")
    if asked and asked not in names:
        raise BuildError(f"MEMOPT_KERNELS={asked} is not one of {', '.join(names)} or off, which this CPU can execute")
    index = names.index(asked) if asked else len(names) - 1
    return Library(handle, path, names[index], index)
