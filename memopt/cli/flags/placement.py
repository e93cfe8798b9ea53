"""Flags for the placement options that change what is estimated (``memopt.spec.placement_options``)."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping
from typing import Any

#: Option -> what the flag takes, and one line. Figures are for a card: ``resident`` is for parameters on a CPU.
FLAGS = {
    "workspace": ("SIZE", "what @host, @cpu and @disk stream state through (default 256MiB)"),
    "directory": ("DIR", "@disk: where files that survive are; as many bytes again on the disk"),
    "offload_gradients": ("WHEN", "@cpu: false (default), early (copied in backward) or true (they leave the card)"),
}
_WORDS = {"true": True, "false": False}


def add_arguments(parser: ArgumentParser) -> None:
    for name, (value, summary) in FLAGS.items():
        parser.add_argument(flag(name), metavar=value, help=summary)


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def told(args: Namespace) -> dict[str, Any]:
    """The options that were given."""
    found = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    how = found.get("offload_gradients")
    if isinstance(how, str):
        found["offload_gradients"] = _WORDS.get(how.lower(), how.lower())
    return found


def placed(specs: Iterable[Any], options: Mapping[str, Any]) -> list[Any]:
    """The specs, each with those of the options that its placement has. Raises InputError for one that none has."""
    if not options:
        return list(specs)
    from estimators.errors import InputError
    from memopt.spec import parse
    from memopt.spec.placement_options import OPTIONS

    found, unused = [], set(options)
    for text in specs:
        spec = parse(text)
        mine = {k: v for k, v in options.items() if spec.placements & set(OPTIONS[k].placements)}
        unused -= mine.keys()
        found.append(spec.replace(options=mine) if mine else spec)
    for name in sorted(unused):
        wanted = " or ".join(f"@{place}" for place in OPTIONS[name].placements)
        raise InputError(f"{flag(name)} is for {wanted}, and none of the specs is; name one with --optim")
    return found
