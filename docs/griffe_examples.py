"""The examples of docstrings, which stand there as doctests, as the sections that Google's style has for them: without
one they would be quotations to Markdown."""

from __future__ import annotations

from typing import Any

import griffe


class Examples(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = sectioned(obj.docstring.value)


def sectioned(text: str) -> str:
    """``>>>`` lines and what they print, up to an empty line, under ``Examples:``."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if line.startswith(">>>") and not inside:
            lines.append("Examples:")
            inside = True
        inside = inside and bool(line.strip())
        lines.append(f"    {line}" if inside else line)
    return "\n".join(lines)
