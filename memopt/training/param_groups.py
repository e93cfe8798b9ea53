"""Param groups as recipes want them: no decay where it harms, rates by layer and by name; and who is where."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from math import isfinite
from typing import Any

from torch import nn
from torch.optim import Optimizer

from memopt.core.hyperparameters import SpecError
from memopt.core.param_names import clean_names, clean_pattern

#: A parameter's place in a stack: the first number that stands alone in its name (``layers.3.mlp.weight``).
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    lr: float | None = None,
    no_decay: Sequence[str] = (),
    layerwise_decay: float | None = None,
    rates: Mapping[str, float] | None = None,
    decay_embeddings: bool = False,
) -> list[dict[str, Any]]:
    """Every parameter that requires a gradient, in exactly one group; pass the result to :func:`memopt.create`.

    No weight decay on norms and embeddings (by module type), on biases and other tensors of one dimension or none,
    and on names that match a pattern in ``no_decay``.

    Args:
        model: Its ``named_parameters()`` are grouped, tied ones once.
        weight_decay: Of what decays, >= 0.
        lr: The rate; None leaves it to :func:`memopt.create`.
        no_decay: Shell-style patterns over names that do not decay either.
        layerwise_decay: d in (0, 1]: a parameter of layer i of L has the rate ``lr * d^(L - i)``. What stands before
            the stack counts as one layer below it and what stands behind as one above, whose rate is ``lr``.
        rates: Pattern over names -> their own rate.
        decay_embeddings: Embeddings decay too, as BERT's do.

    Returns:
        Param groups, each ``{"params": [(name, parameter), …], "weight_decay": …}``, with ``"lr"`` where one is given.

    Raises:
        SpecError: for a pattern that matches no parameter, a parameter that matches two rates, and values that are not
            allowed.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    >>> for g in param_groups(model, 0.1, rates={"2.*": 1e-2}):
    ...     print(g["weight_decay"], g.get("lr"), [name for name, _ in g["params"]])
    0.1 None ['0.weight']
    0.0 None ['0.bias', '1.weight', '1.bias']
    0.1 0.01 ['2.weight']
    0.0 0.01 ['2.bias']
    """
    rates = dict(rates or {})
    _check_numbers(weight_decay, lr, layerwise_decay, rates)
    named = _named(model)
    names = [name for name, p in named if p.requires_grad]
    no_decay = [_found(pattern, names) for pattern in no_decay]
    rates = {_found(pattern, names): rate for pattern, rate in rates.items()}
    bare = set(_without_decay(model, decay_embeddings))
    scale = _layer_scales(names, layerwise_decay)
    groups: dict[tuple[float, float | None], dict[str, Any]] = {}
    for name, p in named:
        if not p.requires_grad:
            continue
        exempt = id(p) in bare or any(fnmatchcase(name, pattern) for pattern in no_decay)
        decay = 0.0 if exempt else float(weight_decay)
        rate = _own_rate(name, rates)
        if rate is None and lr is not None:
            rate = lr * scale[name]
        group = groups.setdefault((decay, rate), {"params": [], "weight_decay": decay, **_key("lr", rate)})
        group["params"].append((name, p))
    return list(groups.values())


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters under their names without wrappers' parts."""
    found = list(model.named_parameters())
    return list(zip(clean_names(name for name, _ in found), (p for _, p in found), strict=True))


def _found(pattern: str, names: Sequence[str]) -> str:
    """The pattern, or what it is without a wrapper's prefix; SpecError where neither matches."""
    for spelling in (pattern, clean_pattern(pattern)):
        if any(fnmatchcase(name, spelling) for name in names):
            return spelling
    raise SpecError(f"the pattern {pattern!r} matches no parameter; the names are {_some(names)}")


def describe(optimizer: Optimizer) -> str:
    """A table of who is where: each group's hyperparameters where groups differ, its size and its parameters.

    Args:
        optimizer: Any ``torch.optim.Optimizer``.

    Returns:
        One line for each group.

    Raises:
        AttributeError: for something that has no ``param_groups``.

    >>> import memopt
    >>> print(describe(memopt.create(param_groups(nn.Linear(4, 2), 0.1), "adamw")))
    group 0  weight_decay=0.1  1 tensors, 8 elements: weight
    group 1  weight_decay=0  1 tensors, 2 elements: bias
    """
    groups = optimizer.param_groups
    keys = dict.fromkeys(key for group in groups for key in group if key not in ("params", "param_names"))
    differing = [key for key in keys if len({repr(g.get(key)) for g in groups}) > 1]
    lines = []
    for i, group in enumerate(groups):
        # Groups of different rules have different hyperparameters.
        values = ", ".join(f"{key}={_short(group[key])}" for key in differing if key in group) or "as all"
        numel = sum(p.numel() for p in group["params"])
        names = group.get("param_names") or [str(tuple(p.shape)) for p in group["params"]]
        lines.append(f"group {i}  {values}  {len(group['params'])} tensors, {numel:,} elements: {_some(names)}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def _without_decay(model: nn.Module, decay_embeddings: bool) -> Iterator[int]:
    """Identities of parameters that are norms', embeddings' or of one dimension; tied ones count as embeddings."""
    for module in model.modules():
        whole = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and not decay_embeddings
        whole = whole or type(module).__name__.endswith("Norm")
        whole = whole or isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm))
        for p in module.parameters(recurse=False):
            if whole or p.dim() <= 1:
                yield id(p)


def _layer_scales(names: Sequence[str], decay: float | None) -> dict[str, float]:
    """The factor of the rate of every name."""
    if decay is None:
        return dict.fromkeys(names, 1.0)
    layers = {name: int(m[1]) for name in names if (m := _LAYER.search(name))}
    if not layers:
        raise SpecError("layerwise_decay needs numbered layers, and no parameter's name has a number")
    last = max(layers.values())
    first_numbered = next(i for i, name in enumerate(names) if name in layers)
    depth = {n: layers.get(n, -1 if i < first_numbered else last + 1) for i, n in enumerate(names)}
    return {name: decay ** (last + 1 - d) for name, d in depth.items()}


def _own_rate(name: str, rates: Mapping[str, float]) -> float | None:
    matching = [pattern for pattern in rates if fnmatchcase(name, pattern)]
    if len(matching) > 1:
        raise SpecError(f"rates: {name} matches {matching[0]!r} and {matching[1]!r}; a parameter has one rate")
    return rates[matching[0]] if matching else None


def _check_numbers(weight_decay: Any, lr: Any, layerwise_decay: Any, rates: Mapping[str, Any]) -> None:
    for name, value in {
        "weight_decay": weight_decay,
        "lr": lr,
        **{f"rates[{k!r}]": v for k, v in rates.items()},
    }.items():
        if value is not None and not (_real(value) and value >= 0):
            raise SpecError(f"{name}={value!r} is not allowed; it must be a finite number >= 0")
    if layerwise_decay is not None:
        if not (_real(layerwise_decay) and 0 < layerwise_decay <= 1):
            raise SpecError(f"layerwise_decay={layerwise_decay!r} is not allowed; it must be a number in (0, 1]")
        if lr is None:
            raise SpecError("layerwise_decay needs lr, the rate of the last layer")


def _real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _key(name: str, value: Any) -> dict[str, Any]:
    return {} if value is None else {name: value}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", and {len(names) - 4} more" if len(names) > 4 else "")
