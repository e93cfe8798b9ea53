"""The model that a count, a name, a path or a module means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from estimators.errors import InputError, shown
from estimators.models.model import Model
from estimators.units import checked_count, count


def architectures() -> tuple[str, ...]:
    """The names of the built-in architectures.

    Returns:
        Names that :func:`estimate` and :func:`resolve` take.

    >>> "llama-3.1-8b" in architectures()
    True
    """
    from estimators.models.published import KNOWN

    return tuple(KNOWN)


def resolve(model: Any, inputs: Any = None) -> Model:
    """The model that a count, a name, a path or a torch.nn.Module means.

    Args:
        model: As of :func:`estimate`.
        inputs: Of one step of a torch.nn.Module, as of :func:`estimate`.

    Returns:
        A :class:`Model`: names and shapes of the parameters, the configuration, and how exact they are.

    Raises:
        InputError: for something that is none of these, with the nearest name.

    >>> resolve("gpt2").provenance, resolve("124M").provenance
    ('exact', 'assumed')
    """
    if inputs is not None and not hasattr(model, "named_parameters"):
        raise InputError(f"inputs are for a torch.nn.Module, which {shown(model)} is not")
    if isinstance(model, Model):
        return model
    if isinstance(model, int) and not isinstance(model, bool):
        from estimators.models.from_count import counted

        return counted(checked_count(model))
    if isinstance(model, Mapping):
        from estimators.models.from_config import from_config

        return from_config(model, "the configuration")
    if hasattr(model, "named_parameters"):
        from estimators.models.from_module import from_module

        return from_module(model, inputs)
    text = model.__fspath__() if hasattr(model, "__fspath__") else model
    if not isinstance(text, str):
        raise InputError(
            "a model is a parameter count, the name of an architecture, a path or a torch.nn.Module, "
            f"not {type(model).__name__}"
        )
    return _from_text(text)


def _from_text(text: str) -> Model:
    number = count(text)
    if number is not None:
        from estimators.models.from_count import counted

        return counted(number)
    from estimators.models.published import published

    config = published(text)
    if config is not None:
        return _known(text, config)
    from os.path import exists

    # A NUL in a path is a ValueError of its own; it names no file.
    if "\0" not in text and exists(text):
        from estimators.models.from_files import from_path

        return from_path(text)
    known = built_in(text)
    if known is not None:
        return known
    from estimators.models.names import plain_name

    name = plain_name(text)
    if "/" in text:
        from estimators.models.from_hub import from_hub, is_id

        if is_id(text):
            return from_hub(text, _unknown(text, name))
    raise InputError(_unknown(text, name))


def built_in(text: str) -> Model | None:
    """The built-in architecture that a published name means, whatever files there are; None where it means none.

    >>> built_in("openai-community/gpt2").name, built_in("./gpt2.json")
    ('gpt2', None)
    """
    from estimators.models.names import notes, otherwise, plain_name
    from estimators.models.published import published

    config = published(text)
    if config is not None:
        return _known(text, config)
    name = plain_name(text)
    config = published(name)
    return None if config is None else _known(name, {**config, **otherwise(text)}, notes(text, name))


def _known(name: str, config: Mapping[str, Any], notes: tuple[str, ...] = ()) -> Model:
    from estimators.models.from_config import from_config

    model = from_config(config, name)
    return model._replace(notes=(*model.notes, *notes)) if notes else model


def _unknown(text: str, name: str) -> str:
    from difflib import get_close_matches

    from estimators.models.published import KNOWN

    near = get_close_matches(name, KNOWN, n=3, cutoff=0.5)
    guess = f"nearest names: {', '.join(near)}" if near else f"names are like {', '.join(list(KNOWN)[10:60:16])}"
    return (
        f"{shown(text)} is neither a parameter count such as 8B, nor a file or folder here, nor a known "
        f"architecture; {guess}"
    )
