"""What a caller gives: inputs of one step, and ``package.module:name``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from estimators.errors import InputError, shown
from estimators.training import Training


def sizes(inputs: Any, asked: Training) -> tuple[int, int]:
    """Sequences and tokens of each: the first two dimensions of the inputs' first tensor, that of ``input_ids`` where
    there is one. Raises :class:`InputError`."""
    if asked.batch != 1 or asked.seq:
        raise InputError("batch and seq are those of the inputs; leave them out")
    first = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    first = first if first is not None else next(_tensors(inputs), None)
    if first is None:
        raise InputError(f"inputs={shown(type(inputs).__name__)} hold no tensor")
    shape = tuple(first.shape)
    return max(1, shape[0]) if shape else 1, max(1, shape[1]) if len(shape) > 1 else 1


def _tensors(given: Any) -> Iterator[Any]:
    if hasattr(given, "shape") and hasattr(given, "dtype"):
        yield given
    elif isinstance(given, Mapping):
        for one in given.values():
            yield from _tensors(one)
    elif isinstance(given, (list, tuple)):
        for one in given:
            yield from _tensors(one)


def named(text: str, flag: str) -> Any:
    """The object ``package.module:name``. Raises :class:`InputError`."""
    module, colon, name = text.partition(":")
    if not colon or not name or not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise InputError(f"{flag}={shown(text)} is not allowed; it is package.module:name")
    try:
        found: Any = import_module(module)
    except ImportError as error:
        raise InputError(f"{flag}={shown(text)}: {module} cannot be imported: {error}") from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise InputError(f"{flag}={shown(text)}: {module} has no {name}")
        found = getattr(found, part)
    return found


def module_and_inputs(module: str, inputs: str | None) -> tuple[Any, Any]:
    """What ``--module`` and ``--inputs`` name: a module or a function that makes one, on the meta device, and inputs or
    a function that makes them. Modules are looked for where Python is run, too. Raises :class:`InputError`."""
    import sys

    import torch

    from estimators.traced.build import reason

    if "" not in sys.path and "." not in sys.path:
        sys.path.insert(0, "")
    found, given = named(module, "--module"), named(inputs, "--inputs") if inputs else None
    if not isinstance(found, torch.nn.Module):
        if not callable(found):
            raise InputError(f"--module={shown(module)} is {shown(type(found).__name__)}, not a torch.nn.Module")
        try:
            with torch.device("meta"):
                found = found()
        except Exception as error:
            raise InputError(f"--module={shown(module)} makes no module on the meta device: {reason(error)}") from None
        if not isinstance(found, torch.nn.Module):
            raise InputError(f"--module={shown(module)} makes {shown(type(found).__name__)}, not a torch.nn.Module")
    if callable(given):
        try:
            given = given()
        except Exception as error:
            raise InputError(f"--inputs={shown(inputs)} makes no inputs: {reason(error)}") from None
    return found, given
