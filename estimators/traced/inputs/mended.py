"""Inputs that a step did not take, changed by what its error says: an argument that it lacks, one too many, a width.

Which arguments belong together, and how wide the features of a tower are, stands in no configuration; what a forward
pass says when it is given something else does. A changed input is run like any other, and a note says what was given.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Iterator
from math import isqrt
from types import TracebackType
from typing import Any

import torch

from estimators.traced.inputs.input_shape import InputShape
from estimators.traced.inputs.makers import maker

#: Changed inputs that are run before a model is given up.
MOST = 16
#: Sizes that a message may have a dimension replaced by.
_LARGEST = 4096
_TOO_MANY = re.compile(r"cannot|both|exactly|only one|expected to be .?None", re.IGNORECASE)
_COLOURS = 3
_CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.ConvTranspose1d)
_Given = dict[str, Any]


class Mended:
    """Ways that are left, nearest to what failed first."""

    def __init__(self, module: Any, asked: InputShape) -> None:
        self.module = module
        self.asked = asked
        self.names = inspect.signature(module.forward).parameters
        self.ahead: list[_Given] = []
        self.seen: set[tuple[Any, ...]] = set()
        self.left = MOST

    def failed(self, given: _Given, error: BaseException) -> None:
        """A step did not take ``given``."""
        self.seen.add(_shapes(given))
        for one in self._changed(given, error):
            if _shapes(one) not in self.seen:
                self.seen.add(_shapes(one))
                self.ahead.append(one)

    def __iter__(self) -> Iterator[_Given]:
        while self.ahead and self.left:
            self.left -= 1
            yield self.ahead.pop(0)

    def _changed(self, given: _Given, error: BaseException) -> Iterator[_Given]:
        message, lines = str(error), _lines(error)
        yield from self._fewer(given, message)
        yield from self._more(given, message, lines)
        yield from _dimensions(given, message, lines)
        yield from _fitted(given, error)
        yield from _resized(given, message)

    def _fewer(self, given: _Given, message: str) -> Iterator[_Given]:
        if _TOO_MANY.search(message):
            for name in given:
                if name in _words(message) and self.names[name].default is not inspect.Parameter.empty:
                    yield {n: v for n, v in given.items() if n != name}

    def _more(self, given: _Given, message: str, lines: list[str]) -> Iterator[_Given]:
        """What the message names, else the lines that the error went through, innermost first."""
        lacking: dict[str, Any] = {}
        for words in map(_words, (message, *lines)):
            for name in self.names:
                called = {name, name.removeprefix("decoder_")} & words
                make = maker(name) if called and name not in given and name not in lacking else None
                if make is not None:
                    try:
                        lacking[name] = make(self.module.config, self.asked)
                    except Exception:  # the configuration has not the fields that it follows from
                        continue
        for name, found in lacking.items():
            yield {**given, name: found}
        if len(lacking) > 1:
            yield {**given, **lacking}


def told(given: _Given) -> str:
    """What was given, as part of a sentence."""
    shapes = {n: list(v.shape) for n, v in given.items() if isinstance(v, torch.Tensor)}
    return "with " + ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def _shapes(given: _Given) -> tuple[Any, ...]:
    return tuple(
        (name, v.dtype, *v.shape) if isinstance(v, torch.Tensor) else (name, repr(v))
        for name, v in sorted(given.items())
    )


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def _lines(error: BaseException) -> list[str]:
    """Source lines that the error went through, innermost first, without torch's and ours."""
    own = ("/torch/", "/estimators/")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not any(part in f.filename for part in own)]
    return [frame.line or "" for frame in reversed(frames)]


def _floats(given: _Given) -> Iterator[tuple[str, torch.Tensor]]:
    for name, t in given.items():
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            yield name, t


def _like(t: torch.Tensor, shape: Any) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=t.dtype, device="meta")


def _patched(t: torch.Tensor) -> Iterator[torch.Tensor]:
    """A list of patches, [n, colours * side * side], with the sides apart."""
    side = isqrt(t.shape[-1] // _COLOURS)
    if t.dim() == 2 and _COLOURS * side * side == t.shape[-1]:
        yield _like(t, (len(t), _COLOURS, side, side))
        yield _like(t, (1, len(t), _COLOURS, side, side))


def _dimensions(given: _Given, message: str, lines: list[str]) -> Iterator[_Given]:
    """A dimension more or fewer, of what the failing line names, else of any."""
    more = "not enough values to unpack" in message or "but got input of size" in message or "out of range" in message
    fewer = "too many values to unpack" in message or "Expected 3D (unbatched) or 4D" in message
    named = [n for n, _ in _floats(given) if lines and n in _words(lines[0])]
    for name, t in _floats(given):
        if named and name not in named:
            continue
        if more or fewer:
            for one in _patched(t):
                yield {**given, name: one}
        if more:
            yield {**given, name: _like(t, (t.shape[0], 1, *t.shape[1:]))}
        if fewer and t.dim() > 2:
            yield {**given, name: _like(t, (t.shape[0] * t.shape[1], *t.shape[2:]))}
    if "floating point" in message:
        for name, t in given.items():
            if lines and name in _words(lines[0]) and isinstance(t, torch.Tensor) and not t.is_floating_point():
                yield {**given, name: t.float()}


def _fitted(given: _Given, error: BaseException) -> Iterator[_Given]:
    """Where a layer is given another width than its weights have: one of the inputs' dimensions larger or smaller by as
    much."""
    found = _misfit(error.__traceback__)
    if found is None:
        return
    got, wanted = found
    for name, t in _floats(given):
        if t.dim() == 3 and t.shape[1] == got and t.shape[2] == wanted:
            yield {**given, name: t.mT.contiguous()}
        for dim in (t.dim() - 1, 1):
            size = t.shape[dim] * wanted
            if t.dim() > 1 and got and not size % got and size != t.shape[dim] * got:
                shape = list(t.shape)
                shape[dim] = size // got
                yield {**given, name: _like(t, shape)}


def _misfit(at: TracebackType | None) -> tuple[int, int] | None:
    """Width of the input of the layer in which an error came up, and that of its weights."""
    found = None
    while at is not None:
        local = at.tb_frame.f_locals
        layer, t = local.get("self"), local.get("input", local.get("x"))
        if isinstance(t, torch.Tensor) and t.dim():
            if isinstance(layer, torch.nn.Linear):
                found = t.shape[-1], layer.in_features
            elif isinstance(layer, torch.nn.LayerNorm):
                found = t.shape[-1], int(layer.normalized_shape[-1])
            elif isinstance(layer, _CONVOLUTIONS) and t.dim() > 1:
                found = t.shape[1], layer.in_channels
        at = at.tb_next
    return found


def _resized(given: _Given, message: str) -> Iterator[_Given]:
    """A size that the message names beside another one."""
    numbers = list(dict.fromkeys(int(n) for n in re.findall(r"\d+", message) if 1 < int(n) <= _LARGEST))
    for name, t in _floats(given):
        for old in numbers:
            for new in numbers:
                if old != new and old in t.shape[1:]:
                    yield {**given, name: _like(t, (t.shape[0], *(new if n == old else n for n in t.shape[1:])))}
