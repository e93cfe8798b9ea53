"""Text from files, fit for a terminal, a page or one sentence of an error."""

from __future__ import annotations

from typing import Any


def printable(text: str, most: int | None = None) -> str:
    r"""``text`` with everything that a terminal or a page would obey (control characters, escape sequences, marks that
    turn the direction of writing, line separators) written out, and cut after ``most`` characters.

    >>> printable("\x1b[2Jname\n"), printable("x" * 9, most=5)
    ('\\x1b[2Jname\\n', 'xxxx…')
    """
    if most is not None and len(text) > most:
        text = text[: most - 1] + "…"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def printable_lines(text: str) -> str:
    """The same for text of several lines of ours: its line breaks stay."""
    return "\n".join(map(printable, text.split("\n")))


def shown(value: Any) -> str:
    """A value of unknown size and kind, short enough for one sentence.

    >>> shown("x" * 100)
    "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…"
    """
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (dict, list, tuple, set, frozenset)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} items"
    if isinstance(value, (str, bytes, bytearray)):
        value = value[:60]
    elif not (value is None or isinstance(value, (bool, int, float))):
        return f"a {type(value).__name__[:30]}"
    text = "".join(c if c.isprintable() else "?" for c in repr(value))
    return text if len(text) <= 40 else text[:37] + "…"
