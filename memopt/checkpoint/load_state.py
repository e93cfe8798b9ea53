"""Saved optimizer state into an optimizer that is here, first all that can be refused, then the rest."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.checkpoint import partial_load
from memopt.checkpoint.conversion.compatibility import Fill, carried, check_fill, unused_fill
from memopt.checkpoint.conversion.in_place import param_states, sum_over_ranks
from memopt.checkpoint.conversion.param_state import ParamState, fill_state, filling
from memopt.checkpoint.conversion.report import Conversion, spelled
from memopt.checkpoint.state.moment_codes import moment_codes
from memopt.checkpoint.state.saved import Record, Source
from memopt.checkpoint.state.slabs import here as slab_of
from memopt.checkpoint.state.slabs import of_columns
from memopt.core.param_names import matching
from memopt.layout.replaced_state import own_entries
from memopt.optim.edits.group_checks import TORCH_EXECUTION, TORCH_KEYS, is_named
from memopt.optim.edits.param_groups import has_shape
from memopt.partitions.dtensor import local_of
from memopt.rules import RULES

if TYPE_CHECKING:
    from memopt.optim.parts import OptimizerParts


class StateLoad:
    """How ``source`` goes into ``optimizer``. Raises ValueError, before anything is changed, for what does not fit."""

    def __init__(self, optimizer: OptimizerParts, source: Source, hyper: bool, fill: Fill, strict: bool = True) -> None:
        self._optimizer, self._source, self._fill, self._strict = optimizer, source, fill, strict
        #: What was taken and what was not, unless ``strict``.
        self.notes: list[str] = []
        check_fill(fill, optimizer.spec.rule)
        names = [name for name, _, _ in optimizer.params.entries()]
        self._records = self._matched(names, hyper) if strict else partial_load.records(source, optimizer)
        self._groups = self._merged_groups() if hyper else [dict(group) for group in optimizer.param_groups]
        self._seed = optimizer.seed if source.seed is None or not hyper else source.seed
        self._old_hyper = {name: group.hyper for group in source.groups for name in group.names}
        shaped = [has_shape(p) for _, p, _ in optimizer.params.entries()]
        if any(record.stepped and not ready for record, ready in zip(self._records, shaped, strict=True)):
            raise ValueError("a parameter of a lazy module has no shape yet: it must see data before it is loaded")
        dormant = [
            source.rule_of(record.name).dormant(
                {**source.rule_of(record.name).hyperparameters, **self._old_hyper.get(record.name, {})}, record.moments
            )
            for record in self._records
        ]
        self._params = [
            (p, param._replace(seed=self._seed))
            for p, param in param_states(optimizer, optimizer.spec, self._groups, optimizer.partition, dormant=dormant)
        ]
        both = zip(self._params, compress(self._records, shaped), strict=True)
        self._records = [
            of_columns(record, slab_of(p, 0)) if record.shape == tuple(p.shape) else record for (p, _), record in both
        ]
        if not strict:
            shapes = {name: record.shape for name, record in source.records.items()}
            here = {record.name: param.shape for record, (_, param) in zip(self._records, self._params, strict=True)}
            self.notes = partial_load.notes("state", shapes, here, "begins at zero")
            both = zip(self._params, self._records, strict=True)
            self._records = [partial_load.resized(record, param, p) for (p, param), record in both]
        moments: set[str] = set()
        for (_, param), record in zip(self._params, self._records, strict=True):
            moments |= {m.name for m, _ in moment_codes(param.spec, param.h, param.name, param.shape)}
            if record.stepped:
                before = source.rule_of(record.name).name
                param.check(record, before, filling(source.spec, param, before, fill))
        unused_fill(fill, moments)

    def _matched(self, names: list[str], ordered: bool) -> list[Record]:
        """The record of each parameter."""
        source = self._source
        saved = [source.records[name] for group in source.groups for name in group.names]
        named = source.named and is_named(self._optimizer.param_groups)
        return [saved[i] for i in match([one.name for one in saved], names, named, source.origin, ordered)]

    def _merged_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups with the saved hyperparameters; numbers stay tuples, lists or tensors as they are."""
        optimizer, source = self._optimizer, self._source
        ours = [len(group["params"]) for group in optimizer.param_groups]
        theirs = [len(group.names) for group in source.groups]
        saved_groups = list(source.groups) if self._strict else partial_load.groups(source, optimizer, self._records)
        if self._strict and ours != theirs:
            raise ValueError(
                f"the param groups differ: saved with {theirs} parameters each, here {ours}; hyper=False keeps the "
                "groups that are here"
            )
        merged = []
        for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
            if saved is None:
                merged.append(dict(group))
                continue
            before, now = source.spec.rule_of(saved.hyper), optimizer.setup.rule_of(group)
            hyperparameters = {*RULES[before].hyperparameters, *TORCH_EXECUTION, "rule"}
            notes = {k: v for k, v in saved.hyper.items() if k not in hyperparameters}
            h = {**group, **copy.deepcopy({**notes, **carried(before, now.name, saved.hyper)})}
            now.check(h)
            optimizer.spec.check_live({k: h[k] for k in now.hyperparameters}, now.name)
            merged.append(h)
        return merged

    def apply(self) -> Conversion:
        """Write the state, group by group and parameter by parameter."""
        optimizer, source = self._optimizer, self._source
        report = Conversion(source.label or spelled(source.spec), spelled(optimizer.spec))
        for (p, param), record in zip(self._params, self._records, strict=True):
            if record.stepped:
                self._write(p, param, record, report)
            else:
                optimizer.state.pop(p, None)
        for group, h in zip(optimizer.param_groups, self._groups, strict=True):
            group.update({k: _assigned(group.get(k), v) for k, v in h.items() if k not in TORCH_KEYS})
        for other in [key for key in optimizer.state if not isinstance(key, Tensor)]:
            del optimizer.state[other]
        optimizer.state.update(source.others)
        optimizer.seed = self._seed
        if source.skipped_steps is not None:
            optimizer.skipped_steps = source.skipped_steps
        if self._params and report.before != report.after:
            sum_over_ranks(report, optimizer.partition, self._params[0][0].device)
        optimizer.store.flush()
        return report

    def _write(self, p: Tensor, param: ParamState, record: Record, report: Conversion) -> None:
        """Into the memory that is there, where the layout is the same."""
        state = self._optimizer.state[p]
        for key in own_entries(param.rule, state):
            del state[key]
        if record.state is None or not is_same(record.state, state):  # else it was loaded into these very tensors
            self._fill_state(p, param, record, state, report)
        if record.own is not None:
            state.update(record.own(self._optimizer.partition.rank))

    def _fill_state(
        self, p: Tensor, param: ParamState, record: Record, state: dict[str, Any], report: Conversion
    ) -> None:
        lines = self._optimizer.store.lines(param.name, p, param.h)
        there = {
            key: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) if isinstance(t, Tensor) else None
            for key, t in state.items()
        }
        same = there == {line.key: (line.dtype, line.shape) for line in lines}
        if not same or not self._optimizer.placement_stores.of(param.name).rewritable:
            state.clear()
            state.update(param.allocate())
        else:
            for tensor in state.values():
                tensor.zero_()
        old = self._source.spec, self._old_hyper[record.name]
        fill_state(param, state, record, old, self._fill, report)


def match(saved: Sequence[str], here: Sequence[str], named: bool, origin: str, ordered: bool) -> list[int]:
    """For each parameter here its place among the saved ones: by name where both have names, else the same place.
    Raises ValueError for a parameter that one of them does not have, and where the order is to be the same and is not.
    """
    if not named:
        if len(saved) != len(here):
            raise ValueError(f"{origin} has state of {len(saved)} parameters, here there are {len(here)}")
        return list(range(len(here)))
    theirs, ours = matching(saved, here)
    places, wanted = {name: i for i, name in enumerate(theirs)}, set(ours)
    for name in (*ours, *theirs):
        if name not in places or name not in wanted:
            who = "the optimizer" if name in places else origin
            raise ValueError(f"{who} has no parameter {name!r}; both must have the same parameters")
    if ordered and theirs != ours:
        first = next((a, b) for a, b in zip(theirs, ours, strict=True) if a != b)
        raise ValueError(
            f"the param groups differ: saved {first[0]!r} where there is {first[1]!r} here; hyper=False keeps the "
            "groups that are here"
        )
    return [places[name] for name in ours]


def is_same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether one has the other's own tensors, and nothing else."""
    return a.keys() == b.keys() and all(_in_place(x, b[key]) for key, x in a.items())


def _in_place(x: Any, y: Any) -> bool:
    if x is y or not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return x is y
    x, y = local_of(x), local_of(y)
    return x.dtype == y.dtype and x.shape == y.shape and (not x.numel() or x.data_ptr() == y.data_ptr())


def _assigned(now: Any, value: Any) -> Any:
    """A rate that is a tensor stays that tensor."""
    if isinstance(now, Tensor) and now is not value:
        return now.copy_(torch.as_tensor(value))
    return value
