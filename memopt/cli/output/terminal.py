"""Output that no terminal refuses: lines that fit it, and the nearest ASCII for what its encoding does not have."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterable

from estimators.report.lines import WIDTH, fold

#: Character -> what stands for it where it cannot be encoded.
_ASCII = {"…": "...", "×": "x", "·": "*", "≥": ">=", "≤": "<=", "→": "->", "–": "-", "—": "-", "−": "-", "µ": "u"}
#: Eighths of a block (memopt inspect, estimate's bars) and braille cells (curves), by how much of them is filled.
_BLOCKS = "_.:-=+*#"
_BRAILLE = " .::+++##"


def substitute(error: UnicodeError) -> tuple[str, int]:
    """A codec error handler (``codecs.register_error``): the replacement, and where encoding goes on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_nearest, error.object[error.start : error.end])), error.end


def _nearest(character: str) -> str:
    """
    >>> [_nearest(c) for c in "…⠀⣿█Ж"]
    ['...', ' ', '#', '#', '?']
    """
    code = ord(character)
    if 0x2800 <= code < 0x2900:
        return _BRAILLE[(code - 0x2800).bit_count()]
    if 0x2581 <= code <= 0x2588:
        return _BLOCKS[code - 0x2581]
    if 0x2500 <= code < 0x2580:  # lines of a table
        return "-" if code in (0x2500, 0x2501, 0x2550, 0x2574, 0x2578) else "|" if code in (0x2502, 0x2503) else "+"
    return _ASCII.get(character, "?")


def never_refuse() -> None:
    """Standard output and error substitute what they cannot encode, from here to the end of the process."""
    codecs.register_error("memopt.ascii", substitute)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and getattr(stream, "errors", "strict") == "strict":
            reconfigure(errors="memopt.ascii")


def columns(most: int = WIDTH) -> int:
    """Characters of a line: those of the terminal or of ``COLUMNS``, from 40 to ``most``; ``most`` in a pipe."""
    return max(40, min(most, _columns() or most))


def folded(lines: Iterable[str], hanging: int | None = None) -> str:
    """Lines of prose as one text, broken where the terminal ends; in a pipe as they are, for ``grep``."""
    width = _columns()
    if width is None:
        return "\n".join(lines)
    return "\n".join(part for line in lines for part in fold(line, max(40, width), hanging))


def _columns() -> int | None:
    asked = os.environ.get("COLUMNS", "")
    if asked.isascii() and asked.isdigit() and 0 < len(asked) < 6:
        return int(asked)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (AttributeError, ValueError, OSError):  # a pipe, a file, or no output at all
        return None
