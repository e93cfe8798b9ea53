"""Which parameters' state goes to the host so that the rest of it fits a device, every format being as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memopt.core.hyperparameters import SpecError
from memopt.core.ledger import Ledger
from memopt.placements import PLACEMENTS
from memopt.pricing.price import named_tensors, price, spec_fields
from memopt.spec import OptimSpec, parse

#: What is asked for where shapes are priced: any device that is not the host.
DEVICE = "cuda"


def offload_share(
    model_or_shapes: Any, limit: int, spec: str | OptimSpec, offload: str, fields: Mapping[str, Any]
) -> OptimSpec:
    """See :func:`memopt.fit`."""
    allowed = [name for name, one in PLACEMENTS.items() if one.keeps_on_host]
    if offload not in allowed:
        raise SpecError(f"offload={offload!r} is not allowed; it is one of {', '.join(allowed)}")
    fields = spec_fields(fields)
    base, options = parse(spec, **{k: v for k, v in fields.items() if k != "options"}), fields.get("options", {})
    if base.overrides:
        raise SpecError("fit chooses the overrides itself; give a spec without any")
    if base.placement != "device":
        raise SpecError(f"offload={offload!r} chooses what leaves the device; give a spec without @{base.placement}")
    base.replace(placement=offload, options=options)  # what is refused in use is refused if nothing moves, too
    names = [name for name, _ in named_tensors(model_or_shapes)]

    def moving(some: set[str]) -> OptimSpec:
        return share(base, offload, options, names, some)

    nbytes = _state(model_or_shapes, base)
    moved: set[str] = set()
    need = on_device(model_or_shapes, base) - limit
    while need > 0:
        moved = chosen(nbytes, need)
        over = on_device(model_or_shapes, moving(moved)) - limit
        if over <= 0:
            break
        if len(moved) == len(nbytes):
            raise SpecError(
                f"with all state @{offload} the device still has {over + limit:,} bytes of it and of buffers, more "
                f"than the {limit:,} of the budget; @cpu has none there, and a smaller workspace= is less"
            )
        need += over  # buffers on the device, which depend on what moves
    for name in sorted(moved, key=lambda name: nbytes[name]):  # what turns out not to be needed stays
        if on_device(model_or_shapes, moving(moved - {name})) > limit:
            break
        moved -= {name}
    return moving(moved)


def chosen(nbytes: dict[str, int], need: int) -> set[str]:
    """Names of parameters whose state is at least ``need`` bytes, or all: the largest first, each as long as all of it
    is needed, then the smallest that is enough for what is left.

    >>> sorted(chosen({"a": 60, "b": 30, "c": 20, "d": 1}, 75))
    ['a', 'c']
    """
    found: set[str] = set()
    order = sorted(nbytes, key=lambda name: -nbytes[name])
    for name in order:
        if 0 < nbytes[name] <= need:
            found.add(name)
            need -= nbytes[name]
    if need > 0:
        rest = [name for name in reversed(order) if name not in found and nbytes[name] >= need]
        if not rest:
            return set(nbytes)
        found.add(rest[0])
        spare = nbytes[rest[0]] - need
        for name in sorted(found, key=lambda name: -nbytes[name]):  # the last one may have made others needless
            if nbytes[name] <= spare:
                found.discard(name)
                spare -= nbytes[name]
    return found


def share(
    base: OptimSpec, offload: str, options: Mapping[str, Any], names: Sequence[str], moved: set[str]
) -> OptimSpec:
    """``base`` with these parameters' state ``@offload``: whichever are fewer are overrides by name."""
    if not moved:
        return base
    stay = [name for name in names if name not in moved]
    if len(stay) < len(moved):
        return base.replace(placement=offload, options=options, overrides={quoted(name): "@device" for name in stay})
    overrides = {quoted(name): f"@{offload}" for name in names if name in moved}
    return base.replace(options=options, overrides=overrides)


def on_device(model_or_shapes: Any, spec: OptimSpec) -> int:
    """Bytes of state and of buffers that are on the device."""
    return sum(line.nbytes for line in price(model_or_shapes, spec, device=DEVICE) if _is_there(line.location))


def _state(model_or_shapes: Any, base: OptimSpec) -> dict[str, int]:
    """Bytes of each parameter's state on the device, for those that have some there."""
    ledger: Ledger = price(model_or_shapes, base, device=DEVICE)
    found: dict[str, int] = {}
    for line in ledger:
        if line.parameter and _is_there(line.location):
            found[line.parameter] = found.get(line.parameter, 0) + line.nbytes
    return found


def _is_there(location: str) -> bool:
    return location.partition(":")[0] == DEVICE


def quoted(name: str) -> str:
    """A name may hold characters that mean something to a shell-style pattern."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
