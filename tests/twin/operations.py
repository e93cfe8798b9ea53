"""The table of operations. Each is a function of the pair and of random numbers; sequences call it by its name."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.twin.machine import Twin

Operation = Callable[["Twin", Random], None]
OPERATIONS: dict[str, Operation] = {}
WEIGHTS: dict[str, int] = {}


def operation(weight: int = 2) -> Callable[[Operation], Operation]:
    """Enter a function in the table; it is drawn ``weight`` times as often as one of weight 1."""

    def enter(function: Operation) -> Operation:
        name = function.__name__.strip("_")
        assert name not in OPERATIONS, name
        OPERATIONS[name], WEIGHTS[name] = function, weight
        return function

    return enter


def load_all() -> dict[str, Operation]:
    from tests.twin import by_hand, grouping, hyper, stepping, surgery, travelling  # noqa: F401

    return OPERATIONS
