"""Warnings that point to the user's line, however many of our and torch's frames are between."""

from __future__ import annotations

import os
import sys
import warnings

_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def warn(message: str) -> None:
    """A UserWarning at the innermost frame that is neither memopt's nor torch's. Python shows the same text from the
    same line once, and so not for one run's optimizer in the place of another's."""
    torch = sys.modules.get("torch")
    inside = (_HERE, *(os.path.join(path, "") for path in getattr(torch, "__path__", ())))
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
