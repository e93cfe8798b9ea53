"""Inputs of one step of a transformers model, as its configuration and its forward pass describe them."""

from __future__ import annotations

from estimators.traced.inputs.input_shape import InputShape
from estimators.traced.inputs.mended import Mended, told
from estimators.traced.inputs.ways import inputs

__all__ = ["InputShape", "Mended", "inputs", "told"]
