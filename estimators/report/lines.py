"""Lines that fit a terminal. textwrap would do, but its import takes longer than an estimate."""

from __future__ import annotations

WIDTH = 80


def wrap(text: str, width: int = WIDTH, hanging: int = 0) -> list[str]:
    """Lines of at most ``width`` characters, broken at spaces; all but the first are indented by ``hanging``.

    >>> wrap("one two three", 8)
    ['one two', 'three']
    >>> wrap("one two three", 8, 2)
    ['one two', '  three']
    """
    lines = [""]
    for word in text.split():
        if lines[-1].strip() and len(lines[-1]) + 1 + len(word) > width:
            lines.append(" " * hanging)
        lines[-1] += f" {word}" if lines[-1].strip() else word
    return lines


def fold(line: str, width: int, hanging: int | None = None) -> list[str]:
    """A line that may be too long, with its own spaces as far as it fits. What follows stands ``hanging`` characters
    from the left, by default under the last column of a table, or two more than the line itself begins with.

    >>> fold("ok   disk   1 GiB free of 2", 30), fold("ok   disk   1 GiB free of 2", 24)
    (['ok   disk   1 GiB free of 2'], ['ok   disk   1 GiB free', '            of 2'])
    >>> fold("  a b", 20)
    ['  a b']
    """
    if len(line) <= width:
        return [line]
    indent = len(line) - len(line.lstrip())
    if hanging is None:
        column = line.rfind("  ", indent, width // 2)
        hanging = column + 2 if column > indent else indent + 2
    hanging = min(hanging, width // 2)
    end = line.rfind(" ", indent + 1, width + 1)
    if end <= 0:  # one word that is longer
        end = line.find(" ", indent + 1)
        if end < 0:
            return [line]
    first, rest = line[:end].rstrip(), " ".join(line[end:].split())
    return [first, *fold(" " * hanging + rest, width, hanging)] if rest else [first]
