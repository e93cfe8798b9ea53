"""A source under another spec, one parameter at a time: what files and other tools' dictionaries are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from memopt.checkpoint.codes import moment_codes
from memopt.checkpoint.fit import Slot, fill_slot
from memopt.checkpoint.plan import Fill, carried, check_fill, unused_fill
from memopt.checkpoint.report import Conversion, spelled
from memopt.checkpoint.stored import Group, Record, Source
from memopt.geometry import Rows, Shape
from memopt.ledger import TensorSpec
from memopt.masters import master_of
from memopt.placements.homes import Homes
from memopt.rules import RULES
from memopt.spec import OptimSpec

#: ``zeros(dtype, shape)``: a tensor of zeros.
Zeros = Callable[[str, Shape], Tensor]


class Converted:
    """``source`` as ``spec`` would hold it, whole, in host memory. Everything that can be refused is refused here.

    ``report`` is complete when :meth:`states` is exhausted.
    """

    def __init__(self, source: Source, spec: OptimSpec, fill: Fill) -> None:
        self.source, self.spec, self._fill = source, spec, fill
        self.report = Conversion(source.label or spelled(source.spec), spelled(spec))
        check_fill(fill, spec.rule)
        spec.check_overrides([name for group in source.groups for name in group.names])
        self.groups = [Group(group.names, self._hyper(group)) for group in source.groups]
        self._old_hyper = {name: group.hyper for group in source.groups for name in group.names}
        kept: set[str] = set()
        for slot, record in self._slots():
            kept |= {m.name for m, _ in moment_codes(slot.spec, slot.h, slot.name, slot.shape)}
            slot.check(record, source.spec.rule, fill)
        unused_fill(fill, kept)

    def _hyper(self, group: Group) -> dict[str, Any]:
        old = RULES[self.source.spec.rule].hyperparameters
        h = self.spec.resolve(carried(self.source.spec.rule, self.spec.rule, group.hyper) | dict(self.spec.hyper))
        return {**{k: v for k, v in group.hyper.items() if k not in old}, **h}

    def _slots(self) -> Iterator[tuple[Slot, Record]]:
        """Every parameter that has state."""
        index, homes = 0, Homes(self.spec.replace(placement="device", overrides={}, options={}), 0, 1)
        for group in self.groups:
            for name in group.names:
                record = self.source.records[name]
                if record.stepped:
                    rows = Rows.whole(record.shape)
                    seed, cpu = self.source.seed or 0, torch.device("cpu")
                    slot = Slot(self.spec, group.hyper, name, index, rows, cpu, seed, lambda x: x, record.dtype, homes)
                    yield slot, record
                index += 1

    def layout(self) -> dict[str, TensorSpec]:
        """``parameter/moment.part`` -> tensor, before anything is computed."""
        found = {}
        for slot, _ in self._slots():
            for moment, fmt in moment_codes(slot.spec, slot.h, slot.name, slot.shape):
                for part, tensor in fmt.layout(moment, slot.rows).items():
                    found[f"{slot.name}/{moment.name}" + (f".{part}" if part else "")] = tensor
            for key, tensor in master_of(slot.spec, slot.dtype).layout(slot.rows, slot.dtype).items():
                found[f"{slot.name}/{key}"] = tensor
        return found

    def states(self, zeros: Zeros | None = None) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """``(parameter, state)``, converted as they are asked for; ``zeros`` may make the tensors elsewhere."""
        for slot, record in self._slots():
            state = (
                slot.allocate() if zeros is None else {line.key: zeros(line.dtype, line.shape) for line in slot.lines()}
            )
            old = self.source.spec, self._old_hyper[slot.name]
            fill_slot(slot, state, record, old, self._fill, self.report)
            yield slot.name, state
            del state  # before the next is made

    def parameters_json(self) -> dict[str, Any]:
        """The manifest's account of every parameter."""
        found: dict[str, Any] = {
            name: {"shape": list(r.shape), **({"dtype": r.dtype} if r.dtype else {})}
            for name, r in self.source.records.items()
        }
        for slot, record in self._slots():
            codes = moment_codes(slot.spec, slot.h, slot.name, slot.shape)
            found[slot.name] |= {
                "step": float(self._fill.get("step", record.step)),
                "moments": {m.name: {"format": fmt.name, "signed": m.signed} for m, fmt in codes},
                **({"master": self.spec.master} if master_of(slot.spec, slot.dtype).kept(slot.dtype) else {}),
            }
        return found
