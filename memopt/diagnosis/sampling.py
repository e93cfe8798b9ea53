"""Which elements stand for a parameter, and how the optimizer at hand stores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from memopt.core.hyperparameters import SpecError
from memopt.core.rows import FLAT_ROW, Rows
from memopt.diagnosis.shadow import NUMEL, Sample, Shadow
from memopt.optimizer import Optimizer
from memopt.rules import RULES, Rule
from memopt.training.clip import local_part

#: Parameters that have a shadow, all groups together.
SHADOWS = 8
#: torch.optim's classes whose rule is here under the same equation and the same names of moments.
TORCH = {"AdamW": "adamw", "Adam": "adam", "SGD": "sgd", "RMSprop": "rmsprop", "RAdam": "radam"}


def rule_of(optimizer: torch.optim.Optimizer, group: Mapping[str, Any] | None = None) -> Rule | None:
    """The rule that can shadow this optimizer's group (its first unless one is given), or None: a sample has no
    statistics of whole tensors or rows."""
    group = optimizer.param_groups[0] if group is None else group
    if isinstance(optimizer, Optimizer):
        rule = optimizer.setup.rule_of(group)
    elif type(optimizer).__name__ in TORCH and type(optimizer).__module__.startswith("torch.optim"):
        rule = RULES[TORCH[type(optimizer).__name__]]
    else:
        return None
    try:
        h = rule.resolve({k: group[k] for k in rule.hyperparameters if k in group})
    except SpecError:
        return None
    whole = any(moment.fixed_format == "rowmean" for moment in rule.moments(h, (2, 2)))
    return rule if rule.element_wise and not rule.reports and not whole else None


def estimate_of(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float | None:
    """What the group's rule has found that ``lr`` is multiplied by, of a rule that does so."""
    if not isinstance(optimizer, Optimizer):
        return None
    estimate = optimizer.setup.rule_of(group).estimate
    return None if estimate is None else estimate(group)


def shadows(optimizer: torch.optim.Optimizer) -> Iterator[Shadow]:
    """One for each group: the largest parameters of it that have state and a gradient, up to its share of SHADOWS."""
    each = max(SHADOWS // len(optimizer.param_groups), 1)
    for group in optimizer.param_groups:
        rule = rule_of(optimizer, group)
        if rule is None:
            continue
        reader = _ours(optimizer) if isinstance(optimizer, Optimizer) else _torchs(optimizer, rule)
        wanted = {moment.name for moment in rule.moments({**rule.hyperparameters, **group}, (2, 2))}
        if not wanted:
            continue  # SGD without momentum
        ready = [
            p for p in group["params"] if optimizer.state.get(p) and p.grad is not None and _has_rows(optimizer, p)
        ]
        largest = sorted(ready, key=lambda p: -local_part(p).numel())[:each]
        # A moment that was switched on while a parameter was frozen is not there before its next step.
        samples = [sample for sample in map(reader, largest) if wanted <= sample.moments().keys()]
        if samples:
            h = {**rule.hyperparameters, **{k: group[k] for k in rule.hyperparameters if k in group}}
            step = int(optimizer.state[samples[0].p].get("step", 1))
            yield Shadow(rule, _Live(group, h), samples, step)


def _has_rows(optimizer: torch.optim.Optimizer, p: Tensor) -> bool:
    """Whether state of some elements of it is on this rank."""
    return bool(local_part(p).numel()) and (
        not isinstance(optimizer, Optimizer) or optimizer.partition.local_rows(p).numel > 0
    )


class _Live(Mapping[str, Any]):
    """The group's hyperparameters as they are now (schedulers change them), and the rule's where it has none."""

    def __init__(self, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.group, self.defaults = group, defaults

    def __getitem__(self, key: str) -> Any:
        return self.group[key] if key in self.group else self.defaults[key]

    def __iter__(self) -> Iterator[str]:
        return iter({**self.defaults, **self.group})

    def __len__(self) -> int:
        return len({**self.defaults, **self.group})


def cutter(row: int, start: int = 0, stop: int | None = None) -> Callable[[Tensor], Tensor]:
    """The first NUMEL elements of ``row`` of a matrix, of a vector those between ``start`` and ``stop``; flat."""

    def cut(x: Tensor) -> Tensor:
        x = local_part(x)
        return x[row].reshape(-1)[:NUMEL] if x.dim() > 1 else x.reshape(-1)[start:stop][:NUMEL]

    return cut


def _mark(optimizer: torch.optim.Optimizer, p: Tensor) -> object:
    """The tensors of a parameter's state, and how often torch has seen each written to."""
    tensors = [x for x in optimizer.state.get(p, {}).values() if isinstance(x, Tensor)]
    return p.shape, [(id(x), x._version) for x in tensors]


def _liveliest(p: Tensor) -> int:
    """The row with the largest gradient: of an embedding, most rows have none."""
    g = local_part(p.grad) if p.grad is not None else local_part(p)
    return int(g.detach().abs().flatten(1).amax(1).argmax()) if g.dim() > 1 else 0


def _torchs(optimizer: torch.optim.Optimizer, rule: Rule) -> Callable[[Tensor], Sample]:
    """Moments as plain tensors under torch.optim's names."""
    names = {id(p): n for g in optimizer.param_groups for n, p in zip(g.get("param_names", []), g["params"])}  # noqa: B905
    index = {id(p): str(i) for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}

    def make(p: Tensor) -> Sample:
        cut = cutter(_liveliest(p))
        group = next(g for g in optimizer.param_groups if any(p is q for q in g["params"]))
        kinds = rule.moments({**rule.hyperparameters, **group}, tuple(p.shape))

        def moments() -> dict[str, tuple[Tensor, str, bool]]:
            state = optimizer.state[p]
            found = [m for m in kinds if m.name in state]
            return {m.name: (cut(state[m.name]).float(), _dtype(state[m.name]), not m.signed) for m in found}

        return Sample(names.get(id(p), index[id(p)]), p, cut, moments, lambda: _mark(optimizer, p))

    return make


def _ours(optimizer: Optimizer) -> Callable[[Tensor], Sample]:
    """Moments decoded, of the rows that are looked at."""
    from memopt.checkpoint.conversion.in_place import param_states

    everything = param_states(optimizer, optimizer.spec, optimizer.param_groups, optimizer.partition)
    found = {id(p): param for p, param in everything}

    def make(p: Tensor) -> Sample:
        param = found[id(p)]
        rows = param.rows
        whole = local_part(p).numel() == Rows.whole(rows.shape).numel  # else p is its rows alone
        if len(rows.shape) >= 2:
            start, stop = rows.bounds
            row = min(max(_liveliest(p) + (0 if whole else start), start), stop - 1)
            cut = cutter(row if whole else row - start)
            here = Rows(rows.shape, row, row + 1, 1)
        else:
            cut = cutter(0, *rows.bounds) if whole else cutter(0)
            here = Rows(rows.shape, rows.first, min(rows.first + NUMEL // FLAT_ROW, rows.stop))

        def moments() -> dict[str, tuple[Tensor, str, bool]]:
            values = {}
            for name, stored in param.record(param.completed(optimizer.state[p])).moments.items():
                x = stored.decode(here).reshape(-1)[:NUMEL]
                values[name] = (
                    x.float().clone(),
                    stored.format.name,
                    name in NEVER_NEGATIVE or not stored.moment.signed,
                )
            return values

        return Sample(param.name, p, cut, moments, lambda: _mark(optimizer, p))

    return make


#: bitsandbytes keeps second moments in a signed code.
NEVER_NEGATIVE = ("exp_avg_sq", "square_avg")


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")
