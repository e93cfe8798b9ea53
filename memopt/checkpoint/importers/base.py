"""What it takes to read another tool's ``state_dict``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memopt.checkpoint.importers.gathered import NON_NEGATIVE, gathered
from memopt.checkpoint.state.moment_codes import CODES
from memopt.checkpoint.state.saved import LivePiece, SavedGroup, SavedMaster, Stored
from memopt.core.rows import Rows, Shape
from memopt.formats import Format
from memopt.rules import RULES, Moment

ToolState = Mapping[str, Any]


class Tool(NamedTuple):
    """One tool. Its group and state dictionaries tell whether it wrote them; the rest translates.

    ``rules(group, state)`` are the rules it may have been, ``hyper(group, rule)`` our names and values, ``unsaved`` the
    hyperparameters that it has and does not save, which stay as they are. ``moments(state)`` is what is stored: name ->
    moment; ``step(state)`` the number of steps taken; ``master(group, state)`` what stands beside the weight. ``state``
    gives the three their state under the names that they read, and ``rule_of(group)`` is for tools whose groups have
    different rules.
    """

    name: str
    wrote: Callable[[ToolState, ToolState], bool]
    rules: Callable[[ToolState, ToolState], tuple[str, ...]]
    hyper: Callable[[ToolState, str], dict[str, Any]]
    moments: Callable[[ToolState], dict[str, Stored]]
    step: Callable[[ToolState], float] = lambda state: float(state["step"])
    unsaved: tuple[str, ...] = ()
    master: Callable[[ToolState, ToolState], SavedMaster | None] = lambda group, state: None
    state: Callable[[ToolState, ToolState], ToolState] = lambda group, state: state
    rule_of: Callable[[ToolState], str] | None = None


def choose(tool: str, origin: str, possible: tuple[str, ...], asked: str | None, likely: str | None = None) -> str:
    """The rule that ``tool`` wrote, ``possible`` being those it may have been: the one ``asked`` for, else the
    ``likely`` one if it may. Raises ValueError for none, and where it must be said which."""
    if not possible:
        raise ValueError(f"{origin} was written by {tool}, with an optimizer that is not known here")
    if asked is None and likely in possible:
        return str(likely)
    if asked is None and len(possible) > 1:
        raise ValueError(
            f"{origin} was written by {tool}, and does not say which of {', '.join(possible)} it was; "
            "say it with rule= of memopt.load (--from on the command line)"
        )
    if asked is not None and asked not in possible:
        raise ValueError(f"{origin} was written by {tool} and can be {', '.join(possible)}, not {asked!r}")
    return asked or possible[0]


def group_of(names: list[str], rule: str, hyper: dict[str, Any], theirs: ToolState) -> SavedGroup:
    """A param group: ``hyper`` of the rule, and what schedulers note in ``theirs``, all as plain values."""
    notes = {k: v for k, v in theirs.items() if k in ("initial_lr", "swa_lr")}
    h = {**RULES[rule].resolve(hyper), **notes}
    return SavedGroup(names, {k: v.item() if isinstance(v, Tensor) and v.numel() == 1 else v for k, v in h.items()})


def stored(name: str, tag: str, shape: Shape, parts: Mapping[str, Tensor], signed: bool | None = None) -> Stored:
    """A moment in an encoding that a checkpoint may hold, by its tag."""
    return encoded(name, CODES[tag], tuple(shape), parts, signed)


def encoded(name: str, fmt: Format, shape: Shape, parts: Mapping[str, Tensor], signed: bool | None = None) -> Stored:
    """A moment in an encoding; ``signed`` is its code's sign, by default the moment's. Raises ValueError for parts that
    are not those of the shape."""
    moment = Moment(name, signed=name not in NON_NEGATIVE if signed is None else signed)
    for part, spec in fmt.layout(moment, Rows.whole(shape)).items():
        found = parts.get(part)
        if not isinstance(found, Tensor) or found.numel() != prod(spec.shape):
            numel = f"{found.numel():,}" if isinstance(found, Tensor) else "no"
            raise ValueError(
                f"{name} has {numel} {part or 'values'}, and its shape {list(shape)} has {prod(spec.shape):,}"
            )
        if part == "codes" and found.dtype != getattr(torch, spec.dtype):
            raise ValueError(f"{name} has codes of {found.dtype}, and {spec.dtype} is what the format has")
        if part != "codes" and not found.is_floating_point():
            raise ValueError(f"{name} has {part or 'values'} of {found.dtype}, which are no floating-point numbers")
    return Stored(moment, fmt, shape, (LivePiece(Rows.whole(shape), parts),))


def plain(name: str, value: Tensor) -> Stored:
    """A moment kept as an ordinary tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        what = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} is {what}, not a tensor of floating-point numbers")
    if value.dtype == torch.bfloat16:
        return stored(name, "bf16", tuple(value.shape), {"": value})
    code = "" if value.dtype == torch.float32 else str(value.dtype).removeprefix("torch.")
    return gathered(name, tuple(value.shape), lambda first, stop: value.reshape(-1)[first:stop], code, {"": value})


def steps(number: float, where: str) -> float:
    """``number`` of steps that were taken. Raises ValueError for one that cannot be."""
    if not isfinite(number) or not 0 <= number < 2**53:
        raise ValueError(f"{where} has taken {number} steps")
    return number


def is_book(theirs: Any, ours: Tensor) -> bool:
    """Whether a file's code book is the one that is known."""
    return (
        isinstance(theirs, Tensor)
        and theirs.shape == ours.shape
        and theirs.is_floating_point()
        and torch.allclose(theirs.cpu().float(), ours, rtol=0, atol=1e-7)
    )


def factors(row: Tensor, col: Tensor) -> Stored:
    """A factored second moment: ``row`` [..., rows, 1] and ``col`` [..., 1, columns]."""
    if row.dim() < 2 or row.shape[-1] != 1 or col.shape != (*row.shape[:-2], 1, col.shape[-1]):
        raise ValueError(f"the factors {list(row.shape)} and {list(col.shape)} are not those of one matrix")
    shape = (*row.shape[:-1], col.shape[-1])
    return stored("exp_avg_sq", "factored", shape, {"row": row.float(), "col": col.float()})
