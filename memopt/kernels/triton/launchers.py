"""Launchers that are met again, of steps without a plan."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from memopt.kernels.triton.launcher import Launcher

if TYPE_CHECKING:
    import torch

    from memopt.kernels.triton import tables
    from memopt.rules import Rule


class Cached(NamedTuple):
    """A launcher, what it was made of, and where in it the tensor of these rows is."""

    launcher: Launcher
    made: Sequence[tables.Tensors]
    places: Mapping[Any, int]


class Launchers:
    """Launchers of steps without a plan, where the same tensors are met again: parameters of a sharded model, or those
    that step one by one inside ``backward()``. The key is all that a launcher is made from; those met last are kept, up
    to so many bytes on the device.

    Where other parameters have gradients than in the step before, one launcher has the tensors of both: a tensor whose
    gradient has no address is left out, and its memory is not looked at."""

    def __init__(self, nbytes: int) -> None:
        self._cached: OrderedDict[Any, Cached] = OrderedDict()
        self._left = nbytes

    def __len__(self) -> int:
        return len(self._cached)

    def find(
        self, rule: Rule, made: Sequence[tables.Tensors], device: torch.device, groups: int
    ) -> tuple[Launcher, list[int]]:
        """A launcher, and the places of these tensors in it; all others of its places are to have no gradient."""
        kind = rule.name, device, groups
        rows = [(t.bucket, *t.row) for t in made]
        found = self._cached.pop((kind, *rows), None) or self._with_more(kind, rows)
        if found is None:
            others = self._without(kind, rows)
            made = [*made, *(t.copy() for t in others.values())]
            places = {row: i for i, row in enumerate([*rows, *others])}
            launcher = Launcher(rule, [t.copy() for t in made], device, groups)
            found = Cached(launcher, made, places)
            self._left -= launcher.nbytes
        self._cached[(kind, *found.places)] = found
        while self._left < 0 and len(self._cached) > 1:
            self._left += self._cached.popitem(last=False)[1].launcher.nbytes
        return found.launcher, [found.places[row] for row in rows]

    def _last(self, kind: Any) -> tuple[Any, Cached] | None:
        return next(((key, one) for key, one in reversed(self._cached.items()) if key[0] == kind), None)

    def _with_more(self, kind: Any, rows: Sequence[Any]) -> Cached | None:
        """The last one, if it has all of these."""
        last = self._last(kind)
        return self._cached.pop(last[0]) if last and all(row in last[1].places for row in rows) else None

    def _without(self, kind: Any, rows: Sequence[Any]) -> dict[Any, tables.Tensors]:
        """What the last one has besides these, if it has most of these; it is not needed any more then. Not where what
        it has besides is more than these: that may be gone."""
        last = self._last(kind)
        if last is None or 2 * sum(row in last[1].places for row in rows) < len(rows):
            return {}
        besides = set(last[1].places).difference(rows)
        if len(besides) > len(rows):
            return {}
        self._left += self._cached.pop(last[0]).launcher.nbytes
        return {row: last[1].made[place] for row, place in last[1].places.items() if row in besides}
