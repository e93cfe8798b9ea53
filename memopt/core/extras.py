"""Packages that only some need: imported where they are used, and one sentence where they are missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def require(module: str, purpose: str) -> Any:
    """The module, imported. Raises ImportError with the line that installs its package, or with what is wrong with an
    installation that is there.

    >>> require("no_such_package.part", "engine='none'")
    Traceback (most recent call last):
    ImportError: engine='none' needs no_such_package: pip install no_such_package
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name in (package, None)
        broken = "" if missing else f", which is installed and does not import ({error}); to install it anew"
        raise ImportError(f"{purpose} needs {package}{broken}: pip install {package}") from error
