"""A step of Muon against torch.optim.Muon in one run: seconds, and memory above the state.

    python benchmarks/muon.py               writes benchmarks/results/muon.json and muon.md

Interleaved steps of both on the same gradients, the shapes of transformers' hidden matrices; medians of what remains
when the first ones are left out. ``torch`` is torch.optim.Muon, with AdamW for nothing: only matrices are stepped. The
bar: at most 0.8 of torch's time on two cores.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from provenance import write_result

import memopt

RESULTS = Path(__file__).parent / "results"
BAR = 0.8
#: Hidden matrices of one layer, and how many layers are stepped.
MODELS: dict[str, tuple[list[tuple[int, int]], int]] = {
    "small, 256": ([(768, 256), (256, 256), (1024, 256), (256, 1024)], 8),
    "GPT-2, 768": ([(2304, 768), (768, 768), (3072, 768), (768, 3072)], 3),
    "Llama-like, 1024": ([(1024, 1024), (256, 1024), (256, 1024), (1024, 1024), *[(2816, 1024)] * 2, (1024, 2816)], 2),
}


def parameters(shapes: list[tuple[int, int]], layers: int) -> list[tuple[str, torch.nn.Parameter]]:
    g = torch.Generator().manual_seed(0)
    found = []
    for layer in range(layers):
        for i, shape in enumerate(shapes):
            p = torch.nn.Parameter(torch.randn(shape, generator=g) / 32)
            p.grad = torch.randn(shape, generator=g)
            found.append((f"layers.{layer}.w{i}", p))
    return found


def measured(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, one after the other in every round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: median(found[1:]) for name, found in times.items()}


def main() -> int:
    parser = ArgumentParser()
    parser.add_argument("--rounds", type=int, default=6)
    rounds = parser.parse_args().rounds
    rows: dict[str, Any] = {}
    for name, (shapes, layers) in MODELS.items():
        made = {}
        for tool in ("torch", "muon", "muon-8bit"):
            named = parameters(shapes, layers)
            made[tool] = (
                torch.optim.Muon([p for _, p in named], 0.02)
                if tool == "torch"
                else memopt.create(named, tool, lr=0.02, adjust_lr_fn="original")
            )
        seconds = measured({tool: opt.step for tool, opt in made.items()}, rounds)
        rows[name] = {
            "seconds": seconds,
            "ratio": {tool: seconds[tool] / seconds["torch"] for tool in ("muon", "muon-8bit")},
        }
        print(name, {k: round(v, 3) for k, v in rows[name]["ratio"].items()}, flush=True)
    result = {"threads": torch.get_num_threads(), "bar": BAR, "rows": rows}
    write_result(RESULTS / "muon.json", result)
    lines = ["| matrices | torch.optim.Muon, ms | `muon` | `muon-8bit` |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {row['seconds']['torch'] * 1e3:.1f} | "
        + " | ".join(f"{ratio:.2f}" for ratio in row["ratio"].values())
        + " |"
        for name, row in rows.items()
    ]
    (RESULTS / "muon.md").write_text("\n".join(lines) + "\n")
    return int(any(row["ratio"]["muon"] > BAR for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
