"""The specs that exist: which formats each rule has, and what may follow them.

RULE[-FORMAT[.FORMAT]][+MASTER][@PLACEMENT][/PARTITION]; what is left out is the plain default.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

from estimators.report.lines import WIDTH, fold
from memopt.cli.output import terminal

SUMMARY = "the specs that exist, and the values on each axis"

#: How a master, a placement or a partition is written in a spec.
_SIGNS = {"master": "+", "placement": "@", "partition": "/"}
#: Columns of a table in a pipe.
PIPED = 200


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", choices=("specs", "recipes"), default="specs", help="default: specs")
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes to show in full")
    parser.add_argument("--aliases", action="store_true", help="names of other tools, and the spec each one means")
    parser.add_argument("--json", action="store_true", help="print every spec with its axes as JSON")


def run(args: Namespace) -> int:
    if args.what == "recipes":
        return _recipes(args.names, args.json)
    if args.names:
        raise ValueError(f"{args.names[0]!r}: only recipes are shown by name (memopt list recipes NAME)")
    if args.json:
        import json

        print(json.dumps(as_json(args.aliases), indent=2))
    else:
        print(terminal.folded(aliases_text() if args.aliases else matrix_text(terminal.columns())))
    return 0


def as_json(aliases: bool) -> dict[str, Any]:
    """``specs``: every valid spec with one format, and its axes; ``pairs``: each rule with two formats, behind which
    the same may follow; ``aliases``, if asked for: name -> spec."""
    from memopt.spec import pairs_of, specs
    from memopt.spec.aliases import ALIASES

    axes = ("rule", "format", "master", "placement", "partition")
    listed = [{"spec": str(s), **{axis: getattr(s, axis) for axis in axes}} for s in specs()]
    pairs = [{"spec": str(s), "rule": s.rule, "signed": s.formats[0], "non_negative": s.formats[1]} for s in pairs_of()]
    found = {"schema": "memopt.list/1", "specs": listed, "pairs": pairs}
    return {**found, **({"aliases": dict(ALIASES)} if aliases else {})}


def _recipes(names: Sequence[str], as_json: bool) -> int:
    """All published recipes in a line each, or those that are named in full."""
    from memopt.recipes import PUBLISHED, recipe

    found = [recipe(name) for name in names or PUBLISHED]
    if as_json:
        import json
        from dataclasses import asdict

        listed = [{k: v for k, v in asdict(r).items() if k != "given"} for r in found]
        print(json.dumps({"schema": "memopt.recipes/1", "recipes": listed}, indent=2))
    elif names:
        print("\n\n".join(terminal.folded(str(r).splitlines(), hanging=16) for r in found))
    else:
        rows = [(r.name, r.spec, f"lr {r.lr:g}", r.kind, r.source.partition(",")[0]) for r in found]
        table = _columns(rows)
        if max(map(len, table)) > terminal.columns(PIPED):
            table = [f"{r.name}: {r.spec}, lr {r.lr:g}, {r.kind}; {r.source.partition(',')[0]}" for r in found]
        print(terminal.folded([*table, "", "memopt list recipes NAME shows one in full"]))
    return 0


def aliases_text() -> list[str]:
    from memopt.spec.aliases import ALIASES

    width = max(map(len, ALIASES))
    return [f"{name:<{width}}  {spec}" for name, spec in ALIASES.items()]


def matrix_text(width: int = WIDTH) -> list[str]:
    """A matrix of rules by formats, the values of the other axes, and what the matrix does not show. Where the matrix
    is wider than ``width``, a line for each rule."""
    from memopt.core.registry import WRAPPERS
    from memopt.formats import FORMATS
    from memopt.masters import MASTERS
    from memopt.partitions import PARTITIONS
    from memopt.placements import PLACEMENTS
    from memopt.rules import RULES
    from memopt.spec import pairs_of, specs

    valid = specs()
    endings = {(s.master, s.placement, s.partition) for s in valid}
    found = {(s.rule, s.format, s.master, s.placement, s.partition) for s in valid}
    pairs = {(s.rule, s.format) for s in valid}
    rows = [["", *FORMATS]]
    for rule, r in RULES.items():
        if r.part_of:
            continue
        rows.append([rule, *(_cell((rule, fmt) in pairs, fmt == r.default_format) for fmt in FORMATS)])
    matrix = _columns(rows)
    fits = max(map(len, matrix)) <= width
    two = pairs_of()
    missing = [(*pair, *end) for pair in sorted(pairs) for end in sorted(endings) if (*pair, *end) not in found]
    return [
        f"{len(valid) + len(two) * len(endings):,} specs: RULE[-FORMAT[.FORMAT]][+MASTER][@PLACEMENT][/PARTITION]",
        "",
        *(matrix if fits else _by_rule(rows)),
        "",
        "yes: RULE-FORMAT; default: what RULE alone means; - : refused, with the reason"
        if fits
        else "RULE-FORMAT of these, and (in brackets) what RULE alone means; others are refused, with the reason",
        "",
        "RULE-FORMAT.FORMAT   one format for signed moments, one for non-negative ones: adamw-8bit.factored",
        *fold(f"    rules            {', '.join(dict.fromkeys(s.rule for s in two))}", 100, 21),
        f"    signed           {', '.join(dict.fromkeys(s.formats[0] for s in two))}",
        f"    non-negative     {', '.join(sorted({s.formats[1] for s in two}, key=list(FORMATS).index))}",
        "",
        *[f"{f'{name}(RULE)':<20} any rule inside {name}, in its formats: {name}(adamw)-8bit" for name in WRAPPERS],
        "",
        *_axis("master", MASTERS, "none"),
        *_axis("placement", PLACEMENTS, "device"),
        *_axis("partition", PARTITIONS, "none"),
        *["not valid: {}-{}+{}@{}/{}".format(*axes) for axes in missing],
    ]


def _cell(valid: bool, default: bool) -> str:
    return "default" if default else "yes" if valid else "-"


def _by_rule(rows: Sequence[Sequence[str]]) -> list[str]:
    """``RULE  FORMAT (DEFAULT) FORMAT …`` of the cells of a matrix."""
    (_, *formats), *rules = rows
    names = max(len(rule) for rule, *_ in rules)
    return [
        f"{rule:<{names}}  "
        + " ".join(
            f"({fmt})" if cell == "default" else fmt for fmt, cell in zip(formats, cells, strict=True) if cell != "-"
        )
        for rule, *cells in rules
    ]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _axis(name: str, values: Any, default: str) -> list[str]:
    """One line per value; the default is written by leaving it out."""
    written = [("(none)" if value == default else _SIGNS[name] + value, values[value].summary) for value in values]
    return [f"{name if i == 0 else '':<10}  {sign:<11}  {summary}" for i, (sign, summary) in enumerate(written)]
