"""``optimizer.convert_(spec)``: another spec in place, in the middle of training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.checkpoint.conversion.compatibility import Fill, check_fill, target_hyper, target_spec, unused_fill
from memopt.checkpoint.conversion.param_state import ParamState, filling
from memopt.checkpoint.conversion.replace_state import PendingConversion, change_of, move
from memopt.checkpoint.conversion.report import Conversion, spelled
from memopt.checkpoint.state.moment_codes import moment_codes
from memopt.core.hyperparameters import SpecError
from memopt.core.ledger import dtype_name
from memopt.engines import ENGINES
from memopt.layout.flattened import needs_shapes
from memopt.optim.edits.param_groups import has_shape
from memopt.optim.edits.regroup import regrouped
from memopt.partitions import PARTITIONS, Partition
from memopt.partitions.ranks import Ranks
from memopt.placements.stores.by_placement import PlacementStores
from memopt.placements.stores.common_commit import go_on_together
from memopt.pricing.price import spec_fields
from memopt.rules import RULES
from memopt.spec import OptimSpec

if TYPE_CHECKING:
    from memopt.optim.edits.param_groups import ParamGroups
    from memopt.optim.parts import OptimizerParts


def param_states(
    optimizer: OptimizerParts,
    spec: OptimSpec,
    hypers: ParamGroups,
    partition: Partition,
    placement_stores: PlacementStores | None = None,
    dormant: Sequence[Iterable[str]] | None = None,
) -> Iterator[tuple[Tensor, ParamState]]:
    """Every parameter of the optimizer with what its state is under ``spec``; ``hypers`` are its groups', ``stores``
    the optimizer's own unless others are given. ``dormant`` are the moments of each parameter that are switched off and
    have their place too, by default those that its state has."""
    placement_stores = placement_stores or optimizer.placement_stores
    optimizer.synchronize()
    of_group = {id(group): h for group, h in zip(optimizer.param_groups, hypers, strict=True)}
    for index, (name, p, group) in enumerate(optimizer.params.entries()):
        if not has_shape(p):
            continue  # it has no state either
        rows, total = partition.local_rows(p), partition.total_of(p)
        h = of_group[id(group)]
        own = optimizer.setup.rule_of(group)
        off = own.dormant(group, optimizer.state.get(p) or ()) if dormant is None else dormant[index]
        yield (
            p,
            ParamState(
                spec,
                RULES[spec.rule_of(h)].keeping(h, off),
                name,
                index,
                rows,
                p.device,
                optimizer.seed,
                total,
                dtype_name(p),
                placement_stores,
                partition.local(p, rows, p.detach()),
                optimizer.capturable,
            ),
        )


@torch.no_grad()
def convert_(
    optimizer: OptimizerParts, spec: str | OptimSpec, *, fill: Fill | None = None, **fields: Any
) -> Conversion:
    """Give the optimizer another spec; its state is decoded and encoded again, parameter by parameter.

    See :meth:`memopt.Optimizer.convert_`.
    """
    optimizer.integrity.check()
    old = optimizer.spec
    new = target_spec(old, spec, fields)
    given = dict(spec_fields(fields).get("hyper", {}))
    work: PendingConversion | None = optimizer.unfinished
    if work is None:
        work = _planned(optimizer, new, given, dict(fill or {}))
    elif (new, given, dict(fill or {})) != (work.new, work.given, work.fill):
        raise RuntimeError(str(work))
    stopped: BaseException | None = None
    with optimizer.integrity.changing("convert_"):
        optimizer.unfinished = None
        try:
            change_of(work)(optimizer, work)
        except BaseException as error:
            if optimizer.unfinished is None:
                work.placement_stores.replaced_by(optimizer.placement_stores)
            if work.between:
                raise
            stopped = error
        else:
            try:
                _commit(optimizer, work)
                move(optimizer, work.placement_stores)
            except BaseException as error:
                _commit(optimizer, work)  # one spec, whose state is then made anew or loaded
                optimizer.placement_stores = work.placement_stores
                if not isinstance(error, Exception):
                    raise
                stopped = error  # all state is the new spec's: what has no room yet is asked for by the next step
    if stopped is not None:
        raise stopped
    if work.every:
        sum_over_ranks(work.report, work.partition, work.every[0].device)
    return work.report


def _planned(
    optimizer: OptimizerParts, new: OptimSpec, given: dict[str, Any], fill: dict[str, Any]
) -> PendingConversion:
    """Everything that can be refused is refused here, before anything is changed."""
    optimizer.store.check_all()
    new.resolve()  # what a group that is added later has
    new = new.for_names([name for name, _, _ in optimizer.params.entries()])
    ENGINES[new.engine].require()
    check_fill(fill, new.rule)
    partition = _partition(optimizer, new)
    if new.is_mixed and optimizer.capturable:
        raise SpecError(f"capturable=True is not allowed with '{new}': a CUDA graph steps parameters of one rule")
    with regrouped(optimizer, new) as rules:
        return _planned_groups(optimizer, new, given, fill, partition, rules)


def _planned_groups(
    optimizer: OptimizerParts,
    new: OptimSpec,
    given: dict[str, Any],
    fill: dict[str, Any],
    partition: Partition,
    rules: Sequence[str],
) -> PendingConversion:
    """``rules`` are those of the groups under the new spec."""
    old = optimizer.spec
    both = zip(optimizer.param_groups, rules, strict=True)
    hypers = [target_hyper(old, new, group, rule, given) for group, rule in both]
    placement_stores = PlacementStores(new, partition.rank, partition.world_size, optimizer.placement_stores)
    try:
        _refuse_left(placement_stores, optimizer, partition)
    except BaseException:
        placement_stores.replaced_by(optimizer.placement_stores, empty=False)  # what somebody else left there stays
        raise
    before = list(param_states(optimizer, old, optimizer.param_groups, optimizer.partition))
    after = [param for _, param in param_states(optimizer, new, hypers, partition, placement_stores)]
    todo = [(p, here, there) for (p, here), there in zip(before, after, strict=True) if optimizer.state.get(p)]
    try:
        _check(optimizer, before, after, fill)
    except BaseException:
        placement_stores.replaced_by(optimizer.placement_stores)
        raise
    together = max(optimizer.partition.world_size, partition.world_size) > 1
    ranks = Ranks(optimizer.process_group, "convert_") if together else None
    report = Conversion(spelled(old), spelled(new))
    return PendingConversion(old, new, given, fill, hypers, partition, placement_stores, after, todo, report, ranks)


def _refuse_left(placement_stores: PlacementStores, optimizer: OptimizerParts, partition: Partition) -> None:
    """Raise ValueError, on every rank, for a directory that holds the state of an earlier run."""
    directory = placement_stores.durable
    if directory is None or directory is optimizer.placement_stores.durable:
        return
    go_on_together(placement_stores, partition, optimizer.process_group)
    if directory.pending:
        raise ValueError(
            f"disk: {directory.path} holds the state of an earlier run, of {next(iter(directory.pending))} and others; "
            "give another directory, or remove this one"
        )


def _partition(optimizer: OptimizerParts, new: OptimSpec) -> Partition:
    """The partition of the new spec. A rank takes some rows of the whole, or collects those of ``/zero1``; sharded
    parameters are sharded by the model, and stay."""
    now, group = optimizer.partition, optimizer.process_group
    now.refuse_conversion(new, needs_shapes(new) if now.is_flattened else None)
    if new.partition == optimizer.spec.partition:
        return now
    replicated = {optimizer.spec.partition, new.partition} == {"none", "zero1"}
    if now.world_size > 1 and not replicated:
        raise SpecError(
            f"convert_ cannot go from '/{optimizer.spec.partition}' over {now.world_size} ranks to "
            f"'{new}': how parameters are sharded is decided before training; save and load"
        )
    return PARTITIONS[new.partition](None if new.partition == "none" else group)


def _check(
    optimizer: OptimizerParts, before: list[tuple[Tensor, ParamState]], after: list[ParamState], fill: Fill
) -> None:
    """Everything that can be refused, before anything is changed."""
    moments: set[str] = set()
    for (p, here), there in zip(before, after, strict=True):
        moments |= {m.name for m, _ in moment_codes(there.spec, there.h, there.name, there.shape)}
        if optimizer.state.get(p):
            own = filling(here.spec, there, here.rule, fill)
            there.check(here.record(optimizer.state[p]), here.rule, own)
    unused_fill(fill, moments)


def _commit(optimizer: OptimizerParts, work: PendingConversion) -> None:
    old, new = optimizer.spec, work.new
    for group, h in zip(optimizer.param_groups, work.hypers, strict=True):
        for key in {*RULES[old.rule_of(group)].hyperparameters, "rule"} - h.keys():
            group.pop(key, None)
        several = f"of {h['rule']}: " if "rule" in h else ""
        work.report.notes += [several + one for one in _differences(group, h)]
        about = RULES[h.get("rule", new.rule)].about_rate(h["lr"], RULES[group.get("rule", optimizer.spec.rule)])
        work.report.notes += [about] if about else []
        group.update(h)
    work.report.notes = list(dict.fromkeys(work.report.notes))
    optimizer.spec = new
    optimizer.rule, optimizer.engine, optimizer.partition = RULES[new.rule], ENGINES[new.engine], work.partition
    optimizer.defaults = new.resolve()


def _differences(group: Mapping[str, Any], h: Mapping[str, Any]) -> list[str]:
    """One sentence for each hyperparameter that the group did not have, or had with another value."""
    h = {key: value for key, value in h.items() if key != "rule"}
    return [
        f"{key} is {value!r} now" + (f", it was {group[key]!r}" if key in group else "")
        for key, value in h.items()
        if key not in group or (group[key] is not value and bool(group[key] != value))
    ]


def sum_over_ranks(report: Conversion, partition: Partition, device: torch.device) -> None:
    """Errors are of the whole state, not of this rank's rows."""
    if partition.world_size > 1 and report.losses:
        local = [[x.squared_error, x.squared] for x in report.losses.values()]
        sums = torch.tensor(local, dtype=torch.float64, device=device)
        for loss, (error, squared) in zip(report.losses.values(), partition.total(sums).tolist(), strict=True):
            loss.squared_error, loss.squared = error, squared
