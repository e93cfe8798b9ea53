"""How far the update of a format is from that of fp32 state, on the same gradients.

    python benchmarks/fidelity.py            writes benchmarks/results/fidelity.json and fidelity.md
    python benchmarks/fidelity.py --only noise,lm --specs adamw-8bit,adamw-4bit      a part of it, to the terminal

Every optimizer gets the same stream of gradients of one matrix, with a rate of 1, and its parameter is set back to
zero before each step: what stands there after the step is the update u. Against u32 of torch.optim.AdamW in fp32, over
the second half of the stream:

    error    |u - u32| / |u32|, of all steps together
    length   <u, u32> / <u32, u32> - 1: how much too long a step is in the direction that it should have
    largest  the largest |u| over the largest |u32|
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # torchao compiles its step, which takes longer than all of this

import torch
from provenance import write_result
from torch import Tensor

import memopt
from memopt.train.job import ModelConfig
from memopt.train.model import LanguageModel
from memopt.train.text import Corpus, load_text

ROWS, COLS, STEPS = 64, 256, 1000
SPECS = (
    "adamw-bf16",
    "adamw-8bit",
    "adamw-fp8",
    "adamw-8bit.4bit",
    "adamw-4bit",
    "adamw-factored",
    "adamw-8bit.factored",
    "adamw-4bit.factored",
    "bitsandbytes 8bit",
    "torchao 8bit",
    "torchao 4bit",
)
RESULTS = Path(__file__).parent / "results"
Stream = Iterator[Tensor]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def noise() -> Stream:
    """Independent normal numbers."""
    g = _generator()
    while True:
        yield torch.randn(ROWS, COLS, generator=g)


def tails() -> Stream:
    """Student's t with 2 degrees of freedom."""
    torch.manual_seed(0)
    t = torch.distributions.StudentT(torch.tensor(2.0))
    while True:
        yield t.sample((ROWS, COLS))


def bursts() -> Stream:
    """Every hundredth step is a hundred times as large."""
    for step, x in enumerate(noise()):
        yield x * (100.0 if step % 100 == 50 else 1.0)


def rare_rows() -> Stream:
    """A row has a gradient once in fifty steps, as that of an embedding."""
    g = _generator()
    for x in noise():
        yield x * (torch.rand(ROWS, 1, generator=g) < 0.02)


def scales() -> Stream:
    """Columns from 1e-8 to 1e4, in one block."""
    order = torch.randperm(COLS, generator=_generator())
    scale = torch.logspace(-8, 4, COLS)[order]
    for x in noise():
        yield x * scale


def spread() -> Stream:
    """Columns over a factor of a hundred, in one block."""
    order = torch.randperm(COLS, generator=_generator())
    scale = torch.logspace(-2, 0, COLS)[order]
    for x in noise():
        yield x * scale


def drop() -> Stream:
    """Three quarters of each block become a hundred times smaller, where a second moment may stay behind."""
    drops = torch.rand(ROWS, COLS, generator=_generator()).argsort(1) < COLS * 3 // 4
    for step, x in enumerate(noise()):
        yield torch.where(drops & (step >= STEPS // 4), 0.01 * x, x)


def pattern() -> Stream:
    """Sizes that are independent of row and column: no matrix of rank one has them."""
    size = torch.exp(torch.randn(ROWS, COLS, generator=_generator()))
    for x in noise():
        yield x * size


def period(length: int) -> Callable[[], Stream]:
    """One step in so many has a gradient, of each element another one."""

    def stream() -> Stream:
        phase = torch.randint(length, (ROWS, COLS), generator=_generator())
        for step, x in enumerate(noise()):
            yield torch.where(phase == step % length, 8.0, 0.05) * x.sign()

    return stream


def lm() -> Stream:
    """A layer of the language model of ``memopt train`` while AdamW trains it."""
    torch.manual_seed(0)
    config = ModelConfig(context=64, width=COLS, layers=2, heads=4)
    model = LanguageModel(config)
    corpus = Corpus(load_text(), config.context)
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3)
    weight = max((p for p in model.parameters() if p.shape[1:] == (COLS,)), key=lambda p: len(p))
    step = 0
    while True:
        opt.zero_grad()
        model(corpus.batch(0, step, 4)).backward()
        assert weight.grad is not None
        yield weight.grad[:ROWS].clone()
        opt.step()
        step += 1


STREAMS: dict[str, Callable[[], Stream]] = {
    "noise": noise,
    "lm": lm,
    "tails": tails,
    "bursts": bursts,
    "rare rows": rare_rows,
    "spread": spread,
    "scales": scales,
    "drop": drop,
    "pattern": pattern,
    **{f"period {n}": period(n) for n in (13, 88, 89, 90)},
}


def optimizer(spec: str, p: Tensor, betas: tuple[float, float]) -> torch.optim.Optimizer | None:
    """None where the package is not here or does not run on this processor."""
    common: dict[str, Any] = {"lr": 1.0, "betas": betas, "weight_decay": 0.0}
    try:
        if spec == "fp32":
            return torch.optim.AdamW([p], **common)
        if spec.startswith("torchao"):
            from torchao.optim import AdamW4bit, AdamW8bit

            return (AdamW4bit if "4bit" in spec else AdamW8bit)([p], **common)
        if spec.startswith("bitsandbytes"):
            return memopt.create([p], "adamw-8bit", engine="bitsandbytes", **common)
        return memopt.create([p], spec, **common)
    except ImportError as error:
        print(f"{spec}: {error}", file=sys.stderr)
        return None


def measure(stream: Stream, specs: list[str], betas: tuple[float, float], steps: int) -> dict[str, dict[str, float]]:
    """What is said above of each spec."""
    params = {spec: torch.nn.Parameter(torch.zeros(ROWS, COLS)) for spec in ("fp32", *specs)}
    made = {spec: optimizer(spec, p, betas) for spec, p in params.items()}
    sums = {spec: torch.zeros(4, dtype=torch.float64) for spec in params}
    for step, g in zip(range(steps), stream, strict=False):
        exact = torch.zeros(0)
        for spec, p in params.items():
            opt = made[spec]
            if opt is None:
                continue
            p.data.zero_()
            p.grad = g.clone()
            opt.step()
            u = p.detach().double()
            if spec == "fp32":
                exact = u.clone()
            if step >= steps // 2:
                found = sums[spec]
                found[0] += (u - exact).square().sum()
                found[1] += (u * exact).sum()
                found[2] += exact.square().sum()
                found[3] = found[3].maximum(u.abs().max())
    largest = float(sums["fp32"][3])
    return {
        spec: {
            "error": float((found[0] / found[2]).sqrt()),
            "length": float(found[1] / found[2] - 1),
            "largest": float(found[3]) / largest,
        }
        for spec, found in sums.items()
        if spec != "fp32" and made[spec] is not None
    }


def table(results: dict[str, dict[str, dict[str, float]]], figure: str) -> list[str]:
    specs = list(next(iter(results.values())))
    lines = ["| stream | " + " | ".join(specs) + " |", "|---|" + "--:|" * len(specs)]
    for name, found in results.items():
        cells = (
            f"{found[spec][figure]:+.3f}" if figure == "length" else f"{found[spec][figure]:.3f}" for spec in specs
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="streams, with commas between them")
    parser.add_argument("--specs", default="", help="specs, with commas between them")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--beta2", type=float, nargs="*", default=[0.999])
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = args.only.split(",") if args.only else list(STREAMS)
    specs = args.specs.split(",") if args.specs else list(SPECS)
    results = {}
    for beta2 in args.beta2:
        for name in names:
            label = name if beta2 == 0.999 else f"{name}, β2 {beta2:g}"
            results[label] = measure(STREAMS[name](), specs, (0.9, beta2), args.steps)
            print(label, {s: tuple(round(x, 3) for x in v.values()) for s, v in results[label].items()}, flush=True)
    if args.only or args.specs:
        return 0
    lines = ["# The update of each format against that of fp32", ""]
    for figure in ("error", "length", "largest"):
        lines += [f"## {figure}", "", *table(results, figure), ""]
    write_result(RESULTS / "fidelity.json", {"steps": args.steps, "results": results})
    (RESULTS / "fidelity.md").write_text("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
