"""Specs as text, and all there are.

RULE[-FORMAT[.FORMAT]][(FALLBACK[-FORMAT])][+MASTER][@PLACEMENT][/PARTITION]; of two formats the second is that of
non-negative moments, and the fallback is the rule of the parameters that RULE does not take.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import product
from typing import Any

from memopt.core.hyperparameters import SpecError
from memopt.core.registry import FORMATS, MASTERS, PARTITIONS, PLACEMENTS, WRAPPERS
from memopt.rules import RULES
from memopt.spec.aliases import ALIASES
from memopt.spec.optim_spec import OptimSpec
from memopt.spec.values import one_spelling

_GRAMMAR = re.compile(
    r"(?P<rule>[a-z][a-z0-9]*(?:\([a-z0-9]+\))?)(?:-(?P<format>[a-z0-9]+(?:\.[a-z0-9]+)?))?(?:\+(?P<master>[a-z0-9]+))?"
    r"(?:@(?P<placement>[a-z0-9]+))?(?:/(?P<partition>[a-z0-9]+))?"
)
#: ``lookahead(adamw-8bit)``: what is inside may be a spec, of which the rule alone stays inside.
_WRAPPED = re.compile(r"([a-z0-9]+)\(([^()]*)\)(.*)")
#: ``muon-8bit(adamw)``: rule, format, fallback, the rest.
_FALLBACK = re.compile(r"([a-z][a-z0-9]*)((?:-[a-z0-9.]+)?)\(([^()]+)\)(.*)")


def parse(text: str | OptimSpec, **fields: Any) -> OptimSpec:
    """The spec that a string means; ``str(spec)`` is the inverse.

    Args:
        text: ``RULE[-FORMAT[.FORMAT]][(FALLBACK[-FORMAT])][+MASTER][@PLACEMENT][/PARTITION]``, another
            tool's name for the same (in any case), or an :class:`OptimSpec`.
        fields: Fields of :class:`OptimSpec`. Beside a string, those that it leaves to their defaults; to an OptimSpec
            ``hyper``, ``rules`` and ``options`` are added, and others replace its own.

    Returns:
        The :class:`OptimSpec`.

    Raises:
        SpecError: for text that cannot be read, a value that does not exist, a combination that means nothing, and a
            field given twice.

    >>> str(parse("adamw-8bit@paged/zero1"))
    'adamw-8bit@paged/zero1'
    >>> str(parse("paged_adamw_8bit"))
    'adamw-8bit@paged'
    """
    if isinstance(text, OptimSpec):
        kinds = ("hyper", "rules", "options")
        added = {name: {**getattr(text, name), **fields[name]} for name in kinds if name in fields}
        return text.replace(**fields | added) if fields else text
    if not isinstance(text, str):
        raise SpecError(f"a spec is a string or an OptimSpec, not {type(text).__name__}")
    lowered = text.strip().lower()
    # An alias names a rule, a format or a placement; a partition may follow it.
    head, slash, tail = lowered.partition("/")
    head, fallback = _without_fallback(head)
    match = _GRAMMAR.fullmatch(_plain_name(head) + slash + tail)
    if match is None:
        raise SpecError(
            f"cannot read the spec {text!r}; the form is RULE[-FORMAT[.FORMAT]][(FALLBACK)][+MASTER][@PLACEMENT]"
            f"[/PARTITION], where RULE is one of {', '.join(_chosen())}"
        )
    axes: dict[str, Any] = {axis: value for axis, value in match.groupdict().items() if value is not None}
    if fallback:
        axes["fallback"] = fallback
    for axis in axes.keys() & fields.keys():
        raise SpecError(f"{axis}={fields[axis]!r} is given beside {text!r}, which says {axis} {axes[axis]!r} already")
    return OptimSpec(**axes, **fields)


def _without_fallback(head: str) -> tuple[str, str]:
    """``muon-8bit(adamw)@host`` as ``muon-8bit@host`` and ``adamw``; the brackets may stand before the format too."""
    match = _FALLBACK.fullmatch(head)
    if match is None or match[1] in WRAPPERS:
        return head, ""
    return f"{match[1]}{match[2]}{match[4]}", match[3]


def _plain_name(head: str) -> str:
    """Names of other tools as ours, inside a wrapper too; what follows the rule stands behind the wrapper."""
    wrapped = _WRAPPED.fullmatch(head)
    if wrapped is None:
        return ALIASES.get(head, head)
    inner = _plain_name(wrapped[2])
    rule = re.match(r"[a-z0-9]*", inner)[0]  # type: ignore[index]
    return f"{wrapped[1]}({rule}){inner[len(rule) :]}{wrapped[3]}"


def lookahead(inner: str | OptimSpec = "adamw", steps: int = 5, rate: float = 0.5) -> OptimSpec:
    """The spec ``inner`` with slow weights that move by ``rate`` of the way to the fast ones every ``steps`` steps, and
    to which the fast ones then return (Zhang et al. 2019). The slow weights are state: in the ledger and in the price.

    Args:
        inner: The spec to wrap, without its own Lookahead.
        steps: Steps of the inner rule between two updates of the slow weights, >= 1.
        rate: Share of the way to the fast weights, in (0, 1].

    Returns:
        The :class:`OptimSpec` ``lookahead(RULE)…``, which can be written as a string too.

    Raises:
        SpecError: for a spec or a number that is not allowed.

    >>> lookahead("adamw-8bit@paged")
    OptimSpec('lookahead(adamw)-8bit@paged', hyper={'lookahead_steps': 5, 'lookahead_rate': 0.5})
    """
    spec = parse(inner)
    hyper = {**spec.hyper, "lookahead_steps": steps, "lookahead_rate": rate}
    return spec.replace(rule=f"lookahead({spec.rule})", hyper=hyper)


def specs(engine: str = "native", *, pairs: bool = False) -> tuple[OptimSpec, ...]:
    """Every valid combination of the axes, rules without a wrapper.

    Args:
        engine: The engine that is to run it, ``"native"`` or ``"bitsandbytes"``.
        pairs: Whether those with a format for each kind of moment are listed too, behind the others.

    Returns:
        :class:`OptimSpec` objects, in the order of the axes.

    Raises:
        KeyError: for no engine of this name.

    >>> len(specs()) > 1000, str(specs()[0]), parse("adamw-8bit.factored") in specs(pairs=True)
    (True, 'adamw', True)
    """
    plain = [*_plain_specs(engine, FORMATS), *(pairs_of(engine) if pairs else ())]
    return tuple(_with_endings(plain))


def pairs_of(engine: str = "native") -> tuple[OptimSpec, ...]:
    """Every rule with a format for each kind of moment, the other axes being the plain default."""
    every = [f"{signed}.{other}" for signed, other in product(FORMATS, FORMATS)]
    return tuple(_plain_specs(engine, [text for text in every if one_spelling(text) == text]))


def _chosen() -> list[str]:
    """The rules that a spec can name: those that are part of another one come with it."""
    return [name for name in RULES if not RULES[name].part_of]


def _plain_specs(engine: str, formats: Iterable[str]) -> Iterator[OptimSpec]:
    for rule, fmt in product(_chosen(), [*formats]):
        with suppress(SpecError):
            yield OptimSpec(rule=rule, format=fmt, engine=engine)


def _with_endings(plain: Iterable[OptimSpec]) -> Iterator[OptimSpec]:
    for spec, (master, placement, partition) in product(plain, [*product(MASTERS, PLACEMENTS, PARTITIONS)]):
        with suppress(SpecError):
            yield spec.replace(master=master, placement=placement, partition=partition)
