"""``opt.explain()``: what really runs, and where that is not literally what was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from memopt.core.ledger import dtype_name
from memopt.formats import FORMATS
from memopt.masters import LOW_PRECISION, MASTERS, Master
from memopt.rules import RULES

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.optim.parts import OptimizerParts


def explain(optimizer: OptimizerParts) -> str:
    """Lines of ``label  text``; parameters kept in 32 bits are listed with the reason."""
    optimizer.store.notice_replaced()
    spec = optimizer.spec
    rows = [
        ("spec", str(spec)),
        *_rules(optimizer),
        ("format", _formats(*spec.formats)),
        ("engine", f"{spec.engine}: {optimizer.engine.explain()}"),
    ]
    rates = (RULES[spec.rule_of(group)].about_rate(group["lr"]) for group in optimizer.param_groups)
    rows += [("rate", about) for about in dict.fromkeys(rates) if about]
    for group in optimizer.param_groups:
        estimate = RULES[spec.rule_of(group)].estimate
        if estimate is not None:
            d, lr = estimate(group), float(group["lr"])
            rows.append(
                ("estimate", f"d is {d:.3g}: with lr {lr:.3g} a step is as long as one at a rate of {d * lr:.3g}")
            )
    in_32_bits: dict[str, list[str]] = {}
    slow: dict[str, list[str]] = {}
    places: dict[tuple[str, str], int] = {}
    for layout, p, _ in optimizer.params.resolved():
        if not _trains(optimizer, p):
            continue
        name = layout.name
        for moment in layout.moments:
            if moment.fallback_reason:
                in_32_bits.setdefault(moment.fallback_reason, []).append(f"{name}.{moment.moment.name}")
        ranks = optimizer.partition.world_size if optimizer.partition.groups(p) else 1
        cut_row = optimizer.partition.cuts_a_row(p)
        path = optimizer.engine.slow_path(layout, p, ranks, cut_row)
        if path:
            slow.setdefault(path, []).append(name)
        place = optimizer.placement_stores.of(name).explain(p.device)
        places[place, spec.for_parameter(name)[1]] = places.get((place, spec.for_parameter(name)[1]), 0) + 1
    rows += [("placement", f"{name}: {text} ({count} parameters)") for (text, name), count in places.items()]
    cores = optimizer.placement_stores.host_cores((name, p) for name, p, _ in optimizer.params.entries())
    if cores is not None:
        rows.append(("threads", cores.explain(torch.get_num_threads())))
    partition = optimizer.partition
    rows.append(
        ("partition", f"{partition.name}: {partition.summary}; rank {partition.rank} of {partition.world_size}")
    )
    rows += [("override", f"{pattern!r} -> {value}") for pattern, value in spec.overrides.items()]
    frozen = [name for name, p, _ in optimizer.params.entries() if not _trains(optimizer, p)]
    if frozen:
        rows.append(("frozen", f"requires_grad is False, without gradients and steps: {_some(frozen)}"))
    rows += [("stepped by", f"{reason}: {_some(names)}") for reason, names in slow.items()]
    rows += [("in 32 bits", f"{reason}: {_some(moments)}") for reason, moments in in_32_bits.items()]
    pages = optimizer.stepper.plan.pages if optimizer.stepper.plan is not None else None
    if pages is not None and pages.wanted:
        rows.append(("pages", pages.explain()))
    rows += _masters(optimizer)
    if optimizer.max_grad_norm is not None:
        text = f"inside the step, to a norm of {optimizer.max_grad_norm} of all gradients together; p.grad stays"
        rows.append(("clipping", text))
    if optimizer.release is not None:
        rows.append(("gradients", optimizer.release.explain()))
    rows.append(("NaN or Inf", f"{optimizer.nonfinite}; {optimizer.skipped_steps} steps skipped so far"))
    return "\n".join(f"{label:<11} {text}" for label, text in rows)


def _trains(optimizer: OptimizerParts, p: Tensor) -> bool:
    """Of DeepSpeed's vectors those that are not here ask for no gradients either."""
    return p.requires_grad or optimizer.partition.is_flattened


def _rules(optimizer: OptimizerParts) -> list[tuple[str, str]]:
    """The rules, each with the parameters that it steps where there are several, and why they are not another's."""
    spec = optimizer.spec
    if not spec.is_mixed:
        return [("rule", f"{optimizer.rule.summary} ({optimizer.rule.source})")]
    mine: dict[str, list[str]] = {name: [] for name in spec.rule_names}
    reasons: dict[str, list[str]] = {}
    declines = optimizer.rule.declines
    for name, p, group in optimizer.params.entries():
        if not _trains(optimizer, p):
            continue
        rule = spec.rule_of(group)
        mine.setdefault(rule, []).append(name)
        reason = declines(name, tuple(p.shape), optimizer.kinds.get(name, "")) if declines is not None else None
        if rule != spec.rule and reason:
            reasons.setdefault(reason, []).append(name)
    rows = []
    for rule, names in mine.items():
        one = RULES[rule]
        rows.append(("rule", f"{rule}: {one.summary} ({one.source}); {len(names)} parameters: {_some(names)}"))
    return rows + [(f"not {spec.rule}"[:11], f"{reason}: {_some(names)}") for reason, names in reasons.items()]


def _formats(signed: str, non_negative: str) -> str:
    if signed == non_negative:
        return FORMATS[signed].summary
    # What a summary says of the other kind of moments does not hold here.
    first, second = (FORMATS[name].summary.partition(";")[0] for name in (signed, non_negative))
    return f"signed moments: {first}; non-negative ones: {second}"


def _masters(optimizer: OptimizerParts) -> list[tuple[str, str]]:
    """What is kept for whom, and how many weights somebody else has changed since."""
    name = optimizer.spec.master
    master = MASTERS[name]
    parameters = [(n, p, dtype_name(p)) for n, p, _ in optimizer.params.entries() if _trains(optimizer, p)]
    low = [n for n, _, dtype in parameters if dtype in LOW_PRECISION]
    if name == "none":
        lost = "of 16 bits are rounded to nearest: updates under half a unit in the last place are lost"
        return [("master", f"none: {len(low)} parameters {lost}")] if low else []
    rows = [("master", f"{name}: {master.summary}; for {len(low)} of {len(parameters)} parameters")]
    wide = [n for n, _, dtype in parameters if dtype not in LOW_PRECISION]
    if wide:
        rows.append(("no master", f"32 bits or more, which hold every update themselves: {_some(wide)}"))
    changed = {n: _foreign(optimizer, master, p) for n, p, _ in parameters if master.key in optimizer.state.get(p, {})}
    if sum(changed.values()):
        names = [n for n, count in changed.items() if count]
        rows.append(
            (
                "changed",
                f"{sum(changed.values()):,} weights are not those that the master was kept for; the "
                f"next step begins from the weights: {_some(names)}",
            )
        )
    return rows


def _foreign(optimizer: OptimizerParts, master: Master, p: Tensor) -> int:
    stored = optimizer.state[p][master.key]
    with torch.no_grad():
        local = optimizer.partition.local(p, optimizer.partition.local_rows(p), p)
    return int((master.foreign(local, stored) & (stored != 0)).sum())


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f", and {len(names) - 4} more" if len(names) > 4 else "")
