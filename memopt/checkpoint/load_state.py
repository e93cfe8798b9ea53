"""Saved optimizer state into an optimizer that is here, first all that can be refused, then the rest."""

from __future__ import annotations

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
from memopt.optim.edits.group_checks import TORCH_KEYS, is_named
from memopt.optim.edits.param_groups import has_shape
from memopt.optim.saving.load_state_dict import TORCH_EXECUTION
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
        named = is_named(optimizer.param_groups)
        self._records = _match(source, names, named) if strict else partial_load.records(source, optimizer)
        self._groups = self._merged_groups(names) if hyper else [dict(group) for group in optimizer.param_groups]
        self._seed = optimizer.seed if source.seed is None or not hyper else source.seed
        self._old_hyper = {name: group.hyper for group in source.groups for name in group.names}
        if not all(has_shape(p) for _, p, _ in optimizer.params.entries()):
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
        both = zip(self._params, self._records, strict=True)
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

    def _merged_groups(self, names: list[str]) -> list[dict[str, Any]]:
        """The optimizer's groups with the saved hyperparameters; numbers stay tuples, lists or tensors as they are."""
        optimizer, source = self._optimizer, self._source
        ours = [len(group["params"]) for group in optimizer.param_groups]
        theirs = [len(group.names) for group in source.groups]
        saved_groups = list(source.groups) if self._strict else partial_load.groups(source, optimizer, self._records)
        where = {record.name: i for i, record in enumerate(self._records)}
        order = [where[name] for group in source.groups for name in group.names] if self._strict else []
        if self._strict and (ours != theirs or order != sorted(order)):
            raise ValueError(
                f"the param groups differ: saved with {theirs} parameters each, here {ours}, or in "
                "another order; hyper=False keeps the groups that are here"
            )
        merged = []
        for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
            if saved is None:
                merged.append(dict(group))
                continue
            before, now = source.spec.rule_of(saved.hyper), optimizer.setup.rule_of(group)
            hyperparameters = {*RULES[before].hyperparameters, *TORCH_EXECUTION, "rule"}
            notes = {k: v for k, v in saved.hyper.items() if k not in hyperparameters}
            h = {**group, **notes, **carried(before, now.name, saved.hyper)}
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
            group.update({k: _kept_in_place(group.get(k), v) for k, v in h.items() if k not in TORCH_KEYS})
        for other in [key for key in optimizer.state if not isinstance(key, Tensor)]:
            del optimizer.state[other]
        optimizer.state.update(source.others)
        optimizer.seed = self._seed
        if source.skipped_steps is not None:
            optimizer.skipped_steps = source.skipped_steps
        if self._params:
            sum_over_ranks(report, optimizer.partition, self._params[0][0].device)
        optimizer.store.flush()
        return report

    def _write(self, p: Tensor, param: ParamState, record: Record, report: Conversion) -> None:
        """Into the memory that is there, where the layout is the same."""
        state = self._optimizer.state[p]
        lines = self._optimizer.store.lines(param.name, p, param.h)
        for key in own_entries(param.rule, state):
            del state[key]
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
        if record.own is not None:
            state.update(record.own(self._optimizer.partition.rank))


def _match(source: Source, names: list[str], named: bool) -> list[Record]:
    """The record of each parameter: by name where both have names, else by place. Raises ValueError for a parameter
    that one of them does not have."""
    saved = [record for group in source.groups for record in (source.records[name] for name in group.names)]
    if not (source.named and named):
        if len(saved) != len(names):
            raise ValueError(f"{source.origin} has state of {len(saved)} parameters, here there are {len(names)}")
        return saved
    theirs, ours = matching(list(source.records), names)
    by_name = dict(zip(theirs, source.records.values(), strict=True))
    for name in (*ours, *theirs):
        if name not in by_name or name not in ours:
            who = "the optimizer" if name in by_name else source.origin
            raise ValueError(f"{who} has no parameter {name!r}; both must have the same parameters")
    return [by_name[name] for name in ours]


def _kept_in_place(now: Any, value: Any) -> Any:
    """A rate that is a tensor stays that tensor."""
    if isinstance(now, Tensor) and now is not value:
        return now.copy_(torch.as_tensor(value))
    return value
