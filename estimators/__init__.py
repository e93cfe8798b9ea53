"""What a model and its optimizer state will cost, before anything is allocated.

The closed-form half of the calculator: importing it does not import torch, and an estimate of a parameter count, an
architecture or a configuration file does not either.

>>> from estimators import estimate
>>> estimate("8B", "adamw-8bit").parameters
8000000000
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

#: public name -> the module that defines it
_PUBLIC = {
    "Column": "estimators.result",
    "Estimate": "estimators.result",
    "InputError": "estimators.errors",
    "Model": "estimators.models.model",
    "Peak": "estimators.memory.memory_row",
    "Row": "estimators.memory.memory_row",
    "architectures": "estimators.models.resolve",
    "capacity": "estimators.hardware",
    "estimate": "estimators.calculator",
    "resolve": "estimators.models.resolve",
}

__all__ = [
    "Column",
    "Estimate",
    "InputError",
    "Model",
    "Peak",
    "Row",
    "architectures",
    "capacity",
    "estimate",
    "resolve",
]

if TYPE_CHECKING:
    from estimators.calculator import estimate
    from estimators.errors import InputError
    from estimators.hardware import capacity
    from estimators.memory.memory_row import Peak, Row
    from estimators.models.model import Model
    from estimators.models.resolve import architectures, resolve
    from estimators.result import Column, Estimate


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'estimators' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value
