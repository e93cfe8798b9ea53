"""The state of one parameter of one optimizer, made from a record of another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memopt.checkpoint.conversion import master_weights
from memopt.checkpoint.conversion.compatibility import Fill, feeds
from memopt.checkpoint.conversion.mean_of import share
from memopt.checkpoint.conversion.recode import Target, transfer
from memopt.checkpoint.conversion.report import Conversion, Loss
from memopt.checkpoint.state.moment_codes import MomentCodes, moment_codes
from memopt.checkpoint.state.saved import LivePiece, Record, SavedMaster, Stored
from memopt.core import dither
from memopt.core.hyperparameters import SpecError
from memopt.core.ledger import Line, TensorSpec
from memopt.core.rows import Rows, Shape
from memopt.formats import Format, Shard
from memopt.layout.param import resolve_layout
from memopt.masters import Master, master_of
from memopt.placements.stores.by_placement import PlacementStores
from memopt.rules import Moment
from memopt.spec import OptimSpec


class Encoding(NamedTuple):
    """How a place holds state: ``codes(spec, h, name, shape)`` are the moments of a parameter with their formats,
    ``master(spec, dtype)`` is what stands beside the weight."""

    codes: Callable[[OptimSpec, Mapping[str, Any], str, Shape], MomentCodes] = moment_codes
    master: Callable[[OptimSpec, str], Master] = lambda spec, dtype: master_of(spec.master, dtype)


#: That of our own optimizers; other tools have others.
OURS = Encoding()


class ParamState(NamedTuple):
    """What decides the state of one parameter, its layout and its dither; the tensors are handed to the methods."""

    spec: OptimSpec
    h: Mapping[str, Any]
    name: str
    index: int  # type: ignore[assignment]  # the parameter's place among all, for the random key
    rows: Rows
    device: torch.device
    seed: int
    total: Callable[[Tensor], Tensor]
    dtype: str
    placement_stores: PlacementStores
    local: Tensor | None = None  # these rows of it, where it is at hand
    capturable: bool = False  # the optimizer's: its number of steps is on the device
    encoding: Encoding = OURS

    @property
    def rule(self) -> str:
        return self.spec.rule_of(self.h)

    @property
    def shape(self) -> Shape:
        return self.rows.shape

    @property
    def codes(self) -> MomentCodes:
        return self.encoding.codes(self.spec, self.h, self.name, self.shape)

    @property
    def master(self) -> Master:
        return self.encoding.master(self.spec, self.dtype)

    def layout(self) -> dict[str, TensorSpec]:
        """The tensors of the state but the step: key -> dtype and shape."""
        found = {
            f"{moment.name}.{part}" if part else moment.name: tensor
            for moment, fmt in self.codes
            for part, tensor in fmt.layout(moment, self.rows).items()
        }
        return found | self.master.layout(self.rows, self.dtype)

    def lines(self) -> list[Line]:
        """The tensors of the state, the step first."""
        layout = resolve_layout(self.spec, self.h, self.name, self.index, self.rows, self.dtype, self.seed)
        return layout.lines(str(self.device), self.capturable)

    def allocate(self) -> dict[str, Tensor]:
        """Zeroed state where the placement says."""
        step, *lines = self.lines()
        counter = torch.zeros((), dtype=torch.float32, device=step.location)
        return {step.key: counter, **self.placement_stores.of(self.name).allocate(self.name, lines, self.device)}

    def completed(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state with what is not there yet, of a moment that was switched on: it begins at zero."""
        missing = [line for line in self.lines() if line.key not in state]
        zeros = {x.key: torch.zeros(x.shape, dtype=getattr(torch, x.dtype), device=self.device) for x in missing}
        return {**state, **zeros}

    def weights(self, rows: Rows) -> Tensor:
        """These rows of the parameter, fp32 [rows.local_shape]."""
        assert self.local is not None
        return master_weights.cut(self.local, self.rows, rows).float()

    def targets(self, state: Mapping[str, Tensor], step: int) -> dict[str, Target]:
        """The parts of each moment within ``state``."""
        found = {}
        for j, (moment, fmt) in enumerate(self.codes):
            shard = Shard(self.rows, dither.key(self.seed, self.index, j), moment.turn(step), self.total)
            keys = {part: f"{moment.name}.{part}" if part else moment.name for part in fmt.layout(moment, self.rows)}
            found[moment.name] = Target(moment, fmt, shard, {part: state[key] for part, key in keys.items()})
        return found

    def record(self, state: Mapping[str, Tensor]) -> Record:
        """The live state as a record."""
        if not state:
            return Record(self.name, self.shape, stepped=False, dtype=self.dtype, weights=self._weights_of())
        moments = {}
        for moment, fmt in self.codes:
            keys = {part: f"{moment.name}.{part}" if part else moment.name for part in fmt.layout(moment, self.rows)}
            piece = LivePiece(self.rows, {part: state[key] for part, key in keys.items()})
            moments[moment.name] = Stored(moment, fmt, self.shape, (piece,))
        beside = master_weights.live(self.master, self.dtype, self.rows, state, self.local)
        return Record(
            self.name,
            self.shape,
            float(state["step"]),
            moments,
            dtype=self.dtype,
            master=beside,
            weights=self._weights_of(),
        )

    def _weights_of(self) -> Callable[[Rows], Tensor] | None:
        p = self.local
        return None if p is None else lambda rows: master_weights.cut(p, self.rows, rows)

    def check(self, record: Record, rule: str, fill: Fill) -> dict[str, str | float]:
        """What feeds each moment: the name of a stored one, or a number. Raises ValueError for what does not fit."""
        if record.shape != self.shape:
            raise ValueError(f"{self.name}: the saved state is of shape {record.shape}, the parameter of {self.shape}")
        plan: dict[str, str | float] = {}
        for moment, fmt in self.codes:
            if moment.begins and moment.name not in record.moments:
                self._check_begins(moment, fill)
                plan[moment.name] = 0.0
                continue
            plan[moment.name] = chosen = feeds(rule, self.rule, self.name, record.moments, moment.name, fill)
            self._check_shape(moment, fmt, record.moments[chosen].format if isinstance(chosen, str) else None)
            negative = record.moments[chosen].moment.signed if isinstance(chosen, str) else chosen < 0
            if negative and not moment.signed and (isinstance(chosen, float) or chosen != moment.name):
                raise ValueError(f"{self.name}: {moment.name} is never negative; {chosen!r} may be")
        if record.master is not None:
            reason = master_weights.refuse(record.master, self.master, self.local)
            if reason:
                raise ValueError(f"{self.name}: {reason}")
        return plan

    def _check_shape(self, moment: Moment, fmt: Format, stored: Format | None) -> None:
        """Raise ValueError for what is of a projection, or of one to other dimensions, where it is to be of another
        shape; a number, ``stored`` None, is of any."""
        if stored is None or not (stored.own_shape or fmt.own_shape):
            return
        if stored.of_shape(self.shape) != fmt.of_shape(self.shape):
            raise ValueError(
                f"{self.name}: {moment.name} is stored as {stored.name}, of shape {list(stored.of_shape(self.shape))}, "
                f"and is to be {fmt.name}, of {list(fmt.of_shape(self.shape))}; "
                f"fill={{{moment.name!r}: 0}} begins it anew"
            )

    def _check_begins(self, moment: Moment, fill: Fill) -> None:
        """Raise SpecError for a moment that begins as the parameter where there is no parameter to begin as."""
        if moment.name in fill:
            raise SpecError(f"fill[{moment.name!r}]: it begins as {moment.begins} and is not filled")
        if self.local is None:
            raise SpecError(
                f"{self.name}: {moment.name!r} begins as {moment.begins}, which is not in a saved state; "
                "load the state as it is and use opt.convert_"
            )


def filling(old: OptimSpec, param: ParamState, before: str, fill: Fill) -> Fill:
    """What of ``fill`` is for this parameter: where the spec's rule becomes another, a parameter that had another rule
    and keeps it keeps its moments too."""
    return {} if param.rule == before and old.rule != param.spec.rule else fill


def fill_state(
    param: ParamState,
    state: dict[str, Tensor],
    record: Record,
    old: tuple[OptimSpec, Mapping[str, Any]],
    fill: Fill,
    report: Conversion,
) -> None:
    """Write a record into zeroed ``state``. ``old`` are the spec and hyperparameters under which it was kept."""
    before = old[0].rule_of(old[1])
    fill = filling(old[0], param, before, fill)
    plan = param.check(record, before, fill)
    step = float(fill.get("step", record.step))
    state["step"].fill_(step)
    for name, target in param.targets(state, int(step)).items():
        chosen = plan[name]
        if target.moment.begins and name not in record.moments:
            target.encode(param.weights)
            continue
        if isinstance(chosen, str):
            scale = _scale(param, name, chosen, record.step, old)
            transfer(record.moments[chosen], target, scale, report.losses.setdefault(name, Loss()))
        elif chosen:
            target.fill(chosen)
        if name in fill:
            report.filled[name] = fill[name]
    report.dropped += [m for m in record.moments if m not in (*plan.values(), *report.dropped)]
    if record.master is not None:
        _fill_master(param, state, record.master, report)


def _fill_master(param: ParamState, state: dict[str, Tensor], before: SavedMaster, report: Conversion) -> None:
    """Zeros, which stand for the weights as they are, are right where there was no master before."""
    master = param.master
    if master.key in state and before.dtype == param.dtype:
        loss = report.losses.setdefault(master.key, Loss())
        master_weights.move(before, master, param.rows, param.local, state[master.key], loss)
    elif before.master.key not in report.dropped:
        report.dropped.append(before.master.key)


def _scale(param: ParamState, name: str, chosen: str, t: float, old: tuple[OptimSpec, Mapping[str, Any]]) -> float:
    """1 within a rule and for a moment taken as the caller said."""
    before = old[0].rule_of(old[1])
    if param.rule == before or name != chosen:
        return 1.0
    return share(param.rule, name, param.h, t) / share(before, name, old[1], t)
