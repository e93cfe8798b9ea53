"""Every rule × format into every other format and every other rule: what it costs, and what is refused.

    python benchmarks/checkpoint_matrix.py --out benchmarks/results/checkpoint_matrix.json

Within a rule, state of a model of several shapes after ten steps of heavy-tailed gradients goes from each format to
each other; the relative error of each moment is held to ``BOUND``. Across rules, in 32 bits, the table says which
moments are carried, which are dropped, and which must be filled. Fails if a bound does not hold or a refusal has no
remedy.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from provenance import write_result
from torch import nn

import memopt
from memopt.checkpoint import source_of
from memopt.checkpoint.conversion.report import Conversion
from memopt.checkpoint.exporting import exported
from memopt.masters import MASTERS

#: Largest relative error of one encoding, root mean square over a moment, of signed and of non-negative moments: half a
#: step of the code and some (8 bits: steps of at most 1.6 % at the top of a block signed, 6.25 % unsigned; 4 bits: 14 %
#: and a factor of two).
BOUND = {
    "32bit": {True: 0.0, False: 0.0},
    "bf16": {True: 0.004, False: 0.004},
    "8bit": {True: 0.015, False: 0.03},
    "fp8": {True: 0.06, False: 0.06},
    "4bit": {True: 0.25, False: 0.45},
    # A matrix of rank one is no approximation with a bound; it is exact where the matrix is of rank one.
    "factored": {True: 0.0, False: 1.0},
}
#: The same of other tools' codes: fp32; the dynamic map, half a step of which is 3 % in the top decade and more below;
#: four bits of which three are decades, or 16 even steps; 8-bit floats (6.25 % at most); 127 and 255 companded steps.
BOUND_OF_TOOLS = {
    "torch": (0.0, 0.0),
    "bitsandbytes": (0.02, 0.01),
    "torchao": (0.02, 0.01),
    "torchao-4bit": (0.25, 0.45),
    "torchao-fp8": (0.04, 0.04),
    "flashoptim": (0.01, 0.01),
}
SIGNED = ("exp_avg", "exp_avg_slow", "momentum_buffer", "grad_avg", "slow", "grad_sum", "moved")
HYPER: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "adafactor": {"beta1": 0.9},
    "rmsprop": {"momentum": 0.9},
}
WRAPPED = {"lookahead(adamw)": "adamw", "lookahead(adafactor)": "adafactor", "lookahead(sgd)": "sgd"}
HYPER |= {wrapped: HYPER[inner] for wrapped, inner in WRAPPED.items() if inner in HYPER}
#: Significant bits that weight and master hold together, of a bf16 weight; none where nothing is kept.
BITS = {"none": 8, "stochastic": 8, "fp32": 24, "kahan": 17, "split": 16, "split16": 24}


INTRODUCTION = [
    "# Conversions",
    "",
    "Largest relative error over all rules, signed / non-negative moments, of a conversion from the format of the row",
    "to that of the column. Moments that stay in 32 bits are not shown.",
    "",
]
RULES = [
    "",
    "From the rule of the row to that of the column: what is carried, and behind a plus what `fill=` must say.",
    "m `exp_avg`, v `exp_avg_sq`, others by name; what a rule does not keep is dropped. Slow weights begin as the",
    "parameters.",
    "",
]
TOOLS = [
    "",
    "AdamW's moments from the format of the row to the codes of another tool (`memopt convert --to`): relative",
    "error, signed / non-negative, of all tensors, those that the tool keeps in 32 bits included.",
    "",
]
KEPT = [
    "",
    "Masters beside weights of bf16, from `adamw-8bit` to `adamw-4bit`: relative error of what weight and master",
    "stand for. The weights keep their bits; a master that begins stands for the weights as they are.",
    "",
]


def require(condition: bool, sentence: str) -> None:
    if not condition:
        raise AssertionError(sentence)


def bound(fmt: str, moment: str) -> float:
    return BOUND[fmt][moment in SIGNED]


def rules() -> dict[str, list[str]]:
    """The formats of every rule."""
    found: dict[str, list[str]] = defaultdict(list)
    for spec in memopt.specs():
        if (spec.master, spec.placement, spec.partition) == ("none", "device", "none"):
            found[spec.rule].append(spec.format)
    for wrapped, inner in WRAPPED.items():
        found[wrapped] = list(found[inner])
    return dict(found)


def build(
    rule: str, fmt: str, steps: int = 10, *, master: str = "none", dtype: torch.dtype = torch.float32
) -> memopt.Optimizer:
    """State of a matrix, a wide one, a convolution, a long and a short vector; columns and rows of different sizes."""
    torch.manual_seed(0)
    shapes = [(96, 160), (65, 700), (64, 32, 3), (5000,), (70,)]
    model = nn.ParameterList([(torch.randn(s) / 10).to(dtype) for s in shapes])
    spec = memopt.OptimSpec(rule=rule, format=fmt, master=master)
    opt = memopt.create(model, spec, **HYPER.get(rule, {}))
    for _ in range(steps):
        for p in model:
            scale = torch.rand(p.shape[-1:]).mul(6).sub(3).exp2()
            grad = torch.randn(p.shape) * scale * torch.rand(p.shape).mul(4).sub(3).exp()
            p.grad = grad.to(dtype)
        opt.step()
    return opt


def within(rule: str, formats: list[str]) -> list[dict[str, Any]]:
    rows = []
    for before, after in itertools.permutations(formats, 2):
        opt = build(rule, before)
        report = opt.convert_(memopt.OptimSpec(rule=rule, format=after, hyper=HYPER.get(rule, {})))
        for moment, error in report.relative_error.items():
            limit = bound(after, moment)
            assert error <= limit, f"{rule}: {before} to {after}, {moment}: {error} is over {limit}"
            rows.append({"rule": rule, "from": before, "to": after, "moment": moment, "error": error, "bound": limit})
    return rows


def across(before: str, after: str) -> dict[str, Any]:
    """What becomes of the moments from one rule to another; ``filled`` had to be said."""
    target = memopt.OptimSpec(rule=after, format="32bit", hyper=HYPER.get(after, {}))
    opt, filled = build(before, "32bit", 3), {}
    while True:
        try:
            report: Conversion = opt.convert_(target, fill=filled)
            break
        except memopt.SpecError as error:
            missing = str(error).partition("needs '")[2].partition("'")[0]
            require("fill=" in str(error) and missing not in filled, f"{before} to {after}: {error}")
            filled[missing] = 0
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    opt.step()
    assert all(bool(p.isfinite().all()) for group in opt.param_groups for p in group["params"])
    return {
        "from": before,
        "to": after,
        "carried": [m for m in report.losses if m not in filled],
        "dropped": report.dropped,
        "filled": list(filled),
    }


def to_tools(before: str) -> list[dict[str, Any]]:
    """AdamW's state in this format as every tool would keep it."""
    rows = []
    for tool, bounds in BOUND_OF_TOOLS.items():
        found = exported(source_of(build("adamw", before)), tool)
        found.state_dict()
        for moment, error in found.report.relative_error.items():
            limit = bounds[moment not in SIGNED]
            require(error <= limit, f"{before} to {tool}, {moment}: {error} is over {limit}")
            rows.append({"from": before, "to": tool, "moment": moment, "bound": limit, "error": error})
    return rows


def masters(before: str, after: str) -> dict[str, Any]:
    """The relative error of what weights of bf16 and master stand for, and whether the weights keep their bits."""
    opt = build("adamw", "8bit", master=before, dtype=torch.bfloat16)
    weights = [p.detach().clone() for group in opt.param_groups for p in group["params"]]
    report = opt.convert_(memopt.OptimSpec(rule="adamw", format="4bit", master=after))
    same = all(torch.equal(p, w) for p, w in zip(opt.param_groups[0]["params"], weights, strict=True))
    require(same, f"+{before} to +{after}: the weights changed")
    key, old = MASTERS[after].key, MASTERS[before].key
    row: dict[str, Any] = {"from": before, "to": after, "error": None}
    if key and old:
        row |= {"error": report.losses[key].relative_error, "bound": 2.0 ** -min(BITS[after], BITS[before])}
        require(row["error"] <= row["bound"], f"+{before} to +{after}: {row['error']} is over {row['bound']}")
    else:
        require((old in report.dropped) == bool(old), f"+{before} to +{after}: the report does not say what is dropped")
    return row


def errors_of(rows: list[dict[str, Any]], bounds: dict[str, tuple[float, float]]) -> list[str]:
    """A table of the largest errors, from every format to what ``bounds`` are of (signed, non-negative)."""
    lines = ["| from | " + " | ".join(bounds) + " |", "|---|" + "---:|" * len(bounds)]
    for before in BOUND:
        cells = []
        for after in bounds:
            errors: dict[bool, float] = {}
            for row in rows:
                if (row["from"], row["to"]) == (before, after):
                    signed = row["moment"] in SIGNED
                    errors[signed] = max(errors.get(signed, 0.0), row["error"])
            cells.append(" / ".join(f"{errors[s]:.2g}" for s in (True, False) if s in errors) or "")
        lines.append(f"| `{before}` | " + " | ".join(cells) + " |")
    limits = [f"{signed:g} / {other:g}" for signed, other in bounds.values()]
    return [*lines, "| *bound* | " + " | ".join(limits) + " |"]


def table(
    rows: list[dict[str, Any]], tools: list[dict[str, Any]], crossed: list[dict[str, Any]], kept: list[dict[str, Any]]
) -> str:
    lines = [*INTRODUCTION, *errors_of(rows, {f: (found[True], found[False]) for f, found in BOUND.items()})]
    lines += [*TOOLS, *errors_of(tools, BOUND_OF_TOOLS)]
    names = list(dict.fromkeys(row["from"] for row in crossed))
    lines += [*RULES, "| from | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    short = {"exp_avg": "m", "exp_avg_sq": "v", "exp_avg_slow": "slow m", "momentum_buffer": "momentum"}
    for before in names:
        cells = []
        for after in names:
            found = next((r for r in crossed if (r["from"], r["to"]) == (before, after)), None)
            carried, filled = ([short.get(m, m) for m in found[k]] if found else [] for k in ("carried", "filled"))
            cells.append(" ".join(carried) + (" +" + " +".join(filled) if filled else ""))
        lines.append(f"| {before} | " + " | ".join(cells) + " |")
    lines += [*KEPT, "| from | " + " | ".join(f"`+{m}`" for m in BITS) + " |", "|---|" + "---:|" * len(BITS)]
    for before in BITS:
        cells = [_cell(before, after, kept) for after in BITS]
        lines.append(f"| `+{before}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(before: str, after: str, kept: list[dict[str, Any]]) -> str:
    if MASTERS[before].key and MASTERS[after].key:
        return next(f"{row['error']:.1g}" for row in kept if (row["from"], row["to"]) == (before, after))
    return "dropped" if MASTERS[before].key else "begins" if MASTERS[after].key else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = rules()
    rows = [row for rule, formats in found.items() for row in within(rule, formats)]
    crossed = [across(a, b) for a, b in itertools.permutations(found, 2)]
    kept = [masters(a, b) for a, b in itertools.product(BITS, BITS) if a != b or MASTERS[a].key]
    tools = [row for before in BOUND for row in to_tools(before)]
    text = table(rows, tools, crossed, kept)
    print(text)
    if args.out:
        short = [[*list(row.values())[:4], round(row["error"], 5)] for row in rows]
        results = {"within": short, "tools": tools, "across": crossed, "masters": kept}
        write_result(args.out, results, flat=True)
        args.out.with_suffix(".md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
