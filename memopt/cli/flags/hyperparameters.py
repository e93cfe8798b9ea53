"""``--hyper NAME=VALUE``: hyperparameters of the rules, some of which change what state there is (sgd's momentum)."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memopt.spec import OptimSpec


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--hyper",
        metavar="NAME=VALUE",
        nargs="+",
        action="extend",
        help="hyperparameters, for specs whose rule has them: momentum=0.9",
    )


def given(texts: Iterable[str] | None) -> dict[str, Any]:
    """Values are JSON (0.9, true, [0.9, 0.99], null) or else text."""
    if texts is None:
        return {}  # an estimate without the flag does not wait for json
    import json

    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name.isidentifier() and equals and value):
            raise ValueError(f"--hyper {text!r} is not allowed; it is NAME=VALUE, such as momentum=0.9")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def with_hyper(specs: Iterable[str | OptimSpec], hyper: Mapping[str, Any]) -> list[Any]:
    """The specs, each with those of the hyperparameters that its rule has. Raises ValueError for one that none has."""
    if not hyper:
        return list(specs)
    from memopt.rules import RULES
    from memopt.spec import parse

    found, unused = [], set(hyper)
    for text in specs:
        spec = parse(text)
        mine = {name: value for name, value in hyper.items() if name in RULES[spec.rule].hyperparameters}
        unused -= mine.keys()
        found.append(spec.replace(hyper={**spec.hyper, **mine}) if mine else spec)
    for name in sorted(unused):
        rules = [rule for rule in RULES if "_" not in rule]  # the others are parts of one
        having = ", ".join(rule for rule in rules if name in RULES[rule].hyperparameters)
        if not having:
            raise ValueError(f"--hyper {name} is not allowed; no rule has it")
        raise ValueError(f"--hyper {name} is for {having}, and none of the specs is; name one with --optim")
    return found
