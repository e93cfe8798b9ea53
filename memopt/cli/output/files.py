"""Files that a verb writes: checked before the work, and named after it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PICTURES = (".png", ".svg", ".pdf")


def check(flag: str, path: str | None, *, picture: bool = False) -> None:
    """Raise before any work where a file could not be written after it: OSError for its place, ValueError for a name
    that is no picture's, ImportError where matplotlib is missing. Leaves no file. ``None`` was not asked for."""
    if path is None:
        return
    file = Path(path)
    try:
        if file.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        there = file.exists()
        with open(file, "ab"):
            pass
        if not there:
            file.unlink()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"{flag} {path!r} cannot be written: {reason}") from None
    if picture:
        check_picture(path)


def check_folder(what: str, path: str | os.PathLike[str], *, parents: bool = True) -> None:
    """Raise OSError before any work where a folder could not be made or written after it. Makes none. ``parents``:
    those that are missing would be made, too."""
    folder = Path(path)
    try:
        there = folder
        while not there.exists() and there != there.parent:
            there = there.parent
        if not there.is_dir():
            reason = "it is a file" if there == folder else f"{str(there)!r} is a file"
        elif not parents and there not in (folder, folder.parent):
            reason = f"there is no folder {str(folder.parent)!r}"
        elif not os.access(there, os.W_OK | os.X_OK):
            reason = "Permission denied"
        else:
            return
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
    raise OSError(f"{what} {str(path)!r} cannot be written: {reason}")


def check_picture(path: str | os.PathLike[str]) -> None:
    """Raise ValueError for a name that is no picture's, ImportError where matplotlib is missing."""
    from importlib.util import find_spec

    if Path(path).suffix.lower() not in PICTURES:
        raise ValueError(f"{str(path)!r} is not a picture that can be written; end its name in .png, .svg or .pdf")
    if find_spec("matplotlib") is None:
        from memopt.core.extras import require

        require("matplotlib", "a plot")


def written(path: str | None, *, quiet_stdout: bool = False) -> None:
    """``written: FILE``; on stderr where standard output is JSON or a configuration."""
    if path is not None:
        from memopt.untrusted.text import printable

        print(f"written: {printable(path)}", file=sys.stderr if quiet_stdout else sys.stdout)
