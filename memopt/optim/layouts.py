"""The layouts of an optimizer's parameters, each resolved once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, final
from weakref import ref

from torch import Tensor, nn

from memopt.core.hyperparameters import SpecError
from memopt.core.ledger import dtype_name
from memopt.core.rows import Shape
from memopt.layout import param
from memopt.partitions.dtensor import is_dtensor
from memopt.rules import RULES

if TYPE_CHECKING:
    import torch

    from memopt.layout.param import ParamLayout
    from memopt.partitions import Partition
    from memopt.spec import OptimSpec

#: Place among all parameters, name, parameter, group.
NumberedParam = tuple[int, str, Tensor, dict[str, Any]]


class _Cached(NamedTuple):
    owner: ref[Tensor]
    shape: torch.Size
    dtype: torch.dtype
    layout: ParamLayout


@final
class Layouts:
    """``of`` resolves a parameter when it is met first, and again where something has changed of what its layout
    depends on: spec, partition, seed, name, place, shape, dtype, and the hyperparameters that choose the moments."""

    def __init__(self) -> None:
        self._made_for: Any = None
        self._cached: dict[int, _Cached] = {}

    def of(
        self, entries: Iterable[NumberedParam], spec: OptimSpec, partition: Partition, seed: int
    ) -> list[ParamLayout]:
        """The layouts of these parameters, in order."""
        made_for = spec, partition, seed
        if self._made_for is None or any(a is not b for a, b in zip(made_for, self._made_for, strict=True)):
            self._made_for, self._cached = made_for, {}
        cached = self._cached
        keys: dict[int, Any] = {}  # by group
        found = []
        for index, name, p, group in entries:
            key = keys.get(id(group))
            if key is None:
                rule = spec.rule_of(group)
                key = keys[id(group)] = rule, RULES[rule].moments_key(group), RULES[rule].modifiers(group)
            one = cached.get(id(p))
            if one is None or not _holds(one, index, name, p, key, partition):
                rows = partition.local_rows(p)
                _check_matrix(name, rows.shape, key[0])
                layout = param.resolve_layout(spec, group, name, index, rows, dtype_name(p), seed)
                one = cached[id(p)] = _Cached(ref(p), p.shape, p.dtype, layout)
            found.append(one.layout)
        return found


def _check_matrix(name: str, shape: Shape, rule: str) -> None:
    """A vector that was moved into a group of matrices, or has only become one there, as of a lazy module."""
    if RULES[rule].declines is not None and len(shape) == 1:
        raise SpecError(
            f"{name} of shape {shape} stands in a group of {rule}, which steps matrices; a vector goes into a group of "
            "another rule"
        )


def _holds(cached: _Cached, index: int, name: str, p: Tensor, key: Any, partition: Partition) -> bool:
    owner, shape, dtype, layout = cached
    if owner() is not p or p.dtype is not dtype or p.shape != shape:
        return False
    if (layout.rule.name, layout.key, layout.modifiers) != key or layout.index != index or layout.name != name:
        return False
    return type(p) is nn.Parameter or not is_dtensor(p) or layout.rows == partition.local_rows(p)
