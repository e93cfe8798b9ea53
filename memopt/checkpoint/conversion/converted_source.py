"""A source under another spec, one parameter at a time: what files and other tools' dictionaries are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from memopt.checkpoint.conversion.compatibility import Fill, carried, check_fill, unused_fill
from memopt.checkpoint.conversion.param_state import OURS, Encoding, ParamState, fill_state, filling
from memopt.checkpoint.conversion.report import Conversion, spelled
from memopt.checkpoint.state.saved import Record, SavedGroup, Source
from memopt.core.ledger import TensorSpec
from memopt.core.rows import Rows, Shape
from memopt.layout.replaced_state import own_entries
from memopt.placements.stores.by_placement import PlacementStores
from memopt.rules import RULES
from memopt.spec import OptimSpec

#: ``zeros(dtype, shape)``: a tensor of zeros.
Zeros = Callable[[str, Shape], Tensor]


def in_memory(dtype: str, shape: Shape) -> Tensor:
    return torch.zeros(shape, dtype=getattr(torch, dtype))


class Converted:
    """``source`` as ``spec`` would hold it, whole, in host memory. Everything that can be refused is refused here.

    ``report`` is complete when :meth:`states` is exhausted.
    """

    def __init__(self, source: Source, spec: OptimSpec, fill: Fill, encoding: Encoding = OURS) -> None:
        spec = spec.for_names([name for group in source.groups for name in group.names])
        self.source, self.spec, self._fill, self._encoding = source, spec, fill, encoding
        self.report = Conversion(source.label or spelled(source.spec), spelled(spec))
        check_fill(fill, spec.rule)
        self.groups = [
            SavedGroup(names, self._hyper(group, rule))
            for group in source.groups
            for rule, names in self._by_rule(group)
        ]
        self._old_hyper = {name: group.hyper for group in source.groups for name in group.names}
        moments: set[str] = set()
        for param, record in self._params():
            moments |= {m.name for m, _ in param.codes}
            before = source.rule_of(record.name).name
            param.check(record, before, filling(source.spec, param, before, fill))
        unused_fill(fill, moments)

    def _by_rule(self, group: SavedGroup) -> list[tuple[str, list[str]]]:
        """The names of a group by their rule under the spec. Those that had one of the spec's rules keep it."""
        if not self.spec.is_mixed:
            return [(self.spec.rule, list(group.names))]
        old = group.hyper.get("rule")
        if old in self.spec.rule_names and self.source.spec.rule == self.spec.rule:
            return [(str(old), list(group.names))]
        found: dict[str, list[str]] = {}
        for name in group.names:
            found.setdefault(self.spec.rule_for(name, self.source.records[name].shape), []).append(name)
        return list(found.items()) or [(self.spec.rule, [])]

    def _hyper(self, group: SavedGroup, rule: str) -> dict[str, Any]:
        before, given = self.source.spec.rule_of(group.hyper), self.spec.given(rule)
        h = self.spec.resolve(carried(before, rule, group.hyper) | given, rule=rule)
        old = {*RULES[before].hyperparameters, "rule"}
        found = {**{k: v for k, v in group.hyper.items() if k not in old}, **h}
        return {**found, **({"rule": rule} if self.spec.is_mixed else {})}

    def _params(self) -> Iterator[tuple[ParamState, Record]]:
        """Every parameter that has state."""
        index, placement_stores = (
            0,
            PlacementStores(self.spec.replace(placement="device", overrides={}, options={}), 0, 1),
        )
        for group in self.groups:
            for name in group.names:
                record = self.source.records[name]
                if record.stepped:
                    rows = Rows.whole(record.shape)
                    seed, cpu = self.source.seed or 0, torch.device("cpu")
                    param = ParamState(
                        self.spec,
                        group.hyper,
                        name,
                        index,
                        rows,
                        cpu,
                        seed,
                        lambda x: x,
                        record.dtype,
                        placement_stores,
                        encoding=self._encoding,
                    )
                    yield param, record
                index += 1

    def steps(self) -> dict[str, float]:
        """parameter -> the steps it has taken, of those that have state."""
        found = {}
        for param, record in self._params():
            fill = filling(self.source.spec, param, self.source.rule_of(record.name).name, self._fill)
            found[param.name] = float(fill.get("step", record.step))
        return found

    def layout(self) -> dict[str, TensorSpec]:
        """``parameter/moment.part`` -> tensor, before anything is computed."""
        return {f"{param.name}/{key}": spec for param, _ in self._params() for key, spec in param.layout().items()}

    def states(self, zeros: Zeros = in_memory) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """``(parameter, state)``, converted as they are asked for; ``zeros`` may make the tensors elsewhere."""
        for param, record in self._params():
            state = {"step": zeros("float32", ())}
            state |= {key: zeros(spec.dtype, spec.shape) for key, spec in param.layout().items()}
            old = self.source.spec, self._old_hyper[param.name]
            fill_state(param, state, record, old, self._fill, self.report)
            yield param.name, state
            del state  # before the next is made

    def own_entries(self) -> dict[str, dict[str, Any]]:
        """What the user has put into the state of each parameter (of several ranks what the first had), but for what
        would be a moment of the new rule."""
        found = {name: record.own(0) for name, record in self.source.records.items() if record.own is not None}
        rules = {name: self.spec.rule_of(group.hyper) for group in self.groups for name in group.names}
        return {name: own_entries(rules[name], own) for name, own in found.items()}

    def parameters_json(self) -> dict[str, Any]:
        """The manifest's account of every parameter."""
        found: dict[str, Any] = {
            name: {"shape": list(r.shape), **({"dtype": r.dtype} if r.dtype else {})}
            for name, r in self.source.records.items()
        }
        steps = self.steps()
        for param, _ in self._params():
            found[param.name] |= {
                "step": steps[param.name],
                "moments": {m.name: {"format": fmt.name, "signed": m.signed} for m, fmt in param.codes},
                **({"master": self.spec.master} if param.master.stored_dtype(param.dtype) else {}),
            }
        return found
