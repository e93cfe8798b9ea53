"""The long runs of ``benchmarks/fidelity.py``: whether second moments follow and stay right, and what periods do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import memopt

Make = Callable[[str, Tensor, tuple[float, float]], Any]
Found = dict[str, Any]
#: What makes an optimizer, and how much of the usual steps are taken.
Run = Callable[[Make, float], Found]


def _update(opt: torch.optim.Optimizer, p: Tensor, g: Tensor) -> Tensor:
    p.data.zero_()
    p.grad = g.clone()
    opt.step()
    return p.detach().double()


# Does a second moment follow? -------------------------------------------------------------------------------------

FREEZE = ("adamw", "adamw-bf16", "adamw-8bit", "adamw-fp8", "adamw-4bit", "adamw-factored")
FREEZE_PEERS = ("bitsandbytes 8bit", "torchao 8bit", "torchao 4bit")


def freeze(make: Make, share: float) -> Found:
    """300 steps of gradient 1, then 3000 of 0.01 on three quarters of each block. Without a first moment u is the
    gradient over the root of the second: what that is, over what it should be."""
    rows, cols, large, small = 16, 256, int(300 * share), int(3000 * share)
    drops = torch.rand(rows, cols, generator=torch.Generator().manual_seed(0)).argsort(1) < cols * 3 // 4
    params = {spec: torch.nn.Parameter(torch.zeros(rows, cols)) for spec in (*FREEZE, *FREEZE_PEERS)}
    made = {spec: make(spec, p, (0.0, 0.999)) for spec, p in params.items()}
    exact = torch.nn.Parameter(torch.zeros(rows, cols))
    truth = make("fp32", exact, (0.0, 0.999))
    for step in range(large + small):
        g = torch.where(drops & (step >= large), 0.01, 1.0)
        wanted = _update(truth, exact, g)
        found = {s: _update(o, params[s], g) for s, o in made.items() if o is not None}
    result = {}
    for spec, u in found.items():
        ratio = (wanted / u).square()[drops]
        low, high = torch.quantile(ratio, torch.tensor([0.01, 0.99], dtype=torch.float64)).tolist()
        result[spec] = {"mean": ratio.mean().item(), "low": low, "high": high, "worst": ratio.max().item()}
    return result


def freeze_page(found: Found) -> list[str]:
    lines = ["| optimizer | mean | 1 % … 99 % | largest |", "|---|--:|--:|--:|"]
    for spec, x in found.items():
        name = f"`{spec}`" if spec in FREEZE else spec
        lines.append(f"| {name} | {x['mean']:.3g} | {x['low']:.2g} … {x['high']:.3g} | {x['worst']:.3g} |")
    return lines


# Does it stay right? ----------------------------------------------------------------------------------------------

BIAS = ("adamw-bf16", "adamw-8bit", "adamw-8bit.4bit", "adamw-4bit")


def bias(make: Make, share: float) -> Found:
    """Length of the update over 1,000 steps around these, of columns over a factor of a hundred."""
    rows, cols, marks = 16, 256, tuple(int(mark * share) for mark in (1_000, 10_000, 100_000))
    g = torch.Generator().manual_seed(0)
    scale = torch.logspace(-2, 0, cols)[torch.randperm(cols, generator=g)]
    params = {spec: torch.nn.Parameter(torch.zeros(rows, cols)) for spec in ("fp32", *BIAS)}
    made = {spec: make(spec, p, (0.9, 0.999)) for spec, p in params.items()}
    sums = {mark: dict.fromkeys(params, 0.0) for mark in marks}
    for step in range(marks[-1]):
        x = torch.randn(rows, cols, generator=g) * scale
        mark = next(mark for mark in marks if step < mark)
        counted = step >= mark - marks[0]
        exact = None
        for spec, p in params.items():
            p.data.zero_()
            p.grad = x
            made[spec].step()
            if counted:
                u = p.detach().double()
                exact = u.clone() if exact is None else exact
                sums[mark][spec] += (u * exact).sum().item()
    return {spec: {str(mark): sums[mark][spec] / sums[mark]["fp32"] - 1 for mark in marks} for spec in BIAS}


def bias_page(found: Found) -> list[str]:
    marks = list(next(iter(found.values())))
    lines = ["| spec | " + " | ".join(f"up to step {int(m):,}" for m in marks) + " |", "|---|" + "--:|" * len(marks)]
    return lines + [f"| `{s}` | " + " | ".join(f"{x[m]:+.3f}" for m in marks) + " |" for s, x in found.items()]


# Periods ----------------------------------------------------------------------------------------------------------

PERIODS = tuple(range(2, 251))
FIBONACCI = (13, 21, 34, 55, 89, 144, 233)


def periods(make: Make, share: float) -> Found:
    """The error where one step in so many has a gradient of 8 and the others have 0.05, of every period at once: a row
    each, in which elements have phases of their own."""
    g = torch.Generator().manual_seed(0)
    length = torch.tensor(PERIODS)[:, None]
    phase = (torch.rand(len(PERIODS), 256, generator=g) * length).long()
    params = {s: torch.nn.Parameter(torch.zeros(phase.shape)) for s in ("fp32", "adamw-8bit", "adamw-4bit")}
    made = {spec: make(spec, p, (0.9, 0.999)) for spec, p in params.items()}
    errors = dict.fromkeys(params, torch.zeros(len(PERIODS), dtype=torch.float64))
    steps, size = int(4000 * share), torch.zeros(len(PERIODS), dtype=torch.float64)
    for step in range(steps):
        sign = torch.randn(phase.shape, generator=g).sign()
        x = torch.where(phase == step % length, 8.0, 0.05) * sign
        found = {spec: _update(made[spec], p, x) for spec, p in params.items()}
        if step >= steps // 2:
            size = size + found["fp32"].square().sum(1)
            for spec, u in found.items():
                errors[spec] = errors[spec] + (u - found["fp32"]).square().sum(1)
    return {spec: (errors[spec] / size).sqrt().tolist() for spec in params if spec != "fp32"}


def _beside(values: list[float], n: int) -> float:
    """The median over the five periods on each side."""
    at = PERIODS.index(n)
    near = torch.tensor([x for i, x in enumerate(values[max(at - 5, 0) : at + 6], max(at - 5, 0)) if i != at])
    return near.median().item()


def periods_page(found: Found) -> list[str]:
    lines = ["| period | " + " | ".join(f"`{s}` (neighbours)" for s in found) + " |", "|---|" + "--:|" * len(found)]
    worst = {max(PERIODS, key=lambda n, v=v: v[PERIODS.index(n)] / _beside(v, n)) for v in found.values()}
    for n in sorted({*FIBONACCI, *worst}):
        cells = (f"{v[PERIODS.index(n)]:.3f} ({_beside(v, n):.3f})" for v in found.values())
        lines.append(f"| {n} | " + " | ".join(cells) + " |")
    return lines


def walk(make: Make, share: float) -> Found:
    """How far SGD moves bf16 weights of 1.5 in 4,000 steps whose gradients sum to zero over each period, in units in
    the last place: with ``+stochastic`` and with fresh random numbers at every step."""
    cols, unit = 512, 2.0**-7
    g = torch.Generator().manual_seed(3)
    tables = [torch.randn(n, cols, generator=g) for n in PERIODS]
    tables = [((x - x.mean(0)) * 0.3 * unit).bfloat16() for x in tables]
    stacked = torch.cat(tables)
    length = torch.tensor(PERIODS)
    begin = length.cumsum(0) - length
    p = torch.nn.Parameter(torch.full((len(PERIODS), cols), 1.5, dtype=torch.bfloat16))
    fresh = p.detach().clone()
    exact = p.detach().double()
    opt = memopt.create([p], "sgd+stochastic", lr=1.0)
    for step in range(int(4000 * share)):
        x = stacked[begin + step % length]
        p.grad = x.clone()
        opt.step()
        exact -= x.double()
        bits = (fresh.float() - x.float()).view(torch.int32)
        fresh = ((bits + torch.randint(1 << 16, bits.shape, generator=g, dtype=torch.int32)) & -65536).view(
            torch.float32
        )
        fresh = fresh.bfloat16()
    return {
        name: ((y.double() - exact) / unit).square().mean(1).sqrt().tolist()
        for name, y in (("+stochastic", p.detach()), ("fresh draws", fresh))
    }


def walk_page(found: Found) -> list[str]:
    names = list(found)
    lines = ["| period | " + " | ".join(names) + " |", "|---|" + "--:|" * len(names)]
    for n in (*FIBONACCI, 100, 150, 240):
        lines.append(f"| {n} | " + " | ".join(f"{found[s][PERIODS.index(n)]:.1f}" for s in names) + " |")
    for word, of in (("all, largest", max), ("all, mean", lambda x: sum(x) / len(x))):
        lines.append(f"| {word} | " + " | ".join(f"{of(found[s]):.1f}" for s in names) + " |")
    return lines


#: name -> title, what measures it, its table, whether the manual has it
LONG: dict[str, tuple[str, Run, Callable[[Found], list[str]], bool]] = {
    "freeze": ("Stored over true second moment after a drop", freeze, freeze_page, True),
    "bias": ("Length of the update after many steps", bias, bias_page, True),
    "periods": ("Error by the period of the gradient", periods, periods_page, True),
    "walk": ("How far +stochastic walks by itself, by the period of the gradient", walk, walk_page, True),
}
