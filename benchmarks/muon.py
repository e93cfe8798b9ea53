"""A step of Muon against torch.optim.Muon in one run: seconds, and memory above the state.

    python benchmarks/muon.py               writes benchmarks/results/muon.json and muon.md (about eight minutes)

Interleaved steps on the same gradients, the hidden matrices of transformers; medians of what remains when the first
ones are left out, each tool beginning every other round. A process keeps the pages that it was given, and its ratio
with them: each set of matrices is stepped in several fresh ones, and the median of their ratios is the row's, beside
the least and the largest. ``torch`` is torch.optim.Muon, with AdamW for nothing: only
matrices are stepped. The bar: at most 0.8 of torch's time on two cores, of every set of matrices, squares (whose
products cannot be fewer) among them. ``roof`` is what the products that ``muon`` takes would need at the best rate of
products that this processor shows in the same run, of two 1024 x 1024 in bfloat16 together: no step in as many
products is shorter.

Memory is the highest resident size of a process during a step over that before it, state and gradients being there; of
``muon`` it is to be within the bound that docs/muon.md states, and what torch's product of two such matrices takes
besides its result, measured in the same way. The C library returns all tensors above 1 MiB as soon as they are freed
(``MALLOC_MMAP_THRESHOLD_``): else it is its holes that are measured.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from provenance import write_result
from torch.utils.flop_counter import FlopCounterMode

import memopt
from memopt.kernels.newton_schulz import newton_schulz
from memopt.rules import RULES

RESULTS = Path(__file__).parent / "results"
BAR = 0.8
TOOLS = ("torch", "muon", "muon-8bit", "muon-4bit")
PRODUCT = "product"
#: Hidden matrices of one layer, and how many layers are stepped.
MODELS: dict[str, tuple[list[tuple[int, int]], int]] = {
    "small, 256": ([(768, 256), (256, 256), (1024, 256), (256, 1024)], 8),
    "GPT-2, 768": ([(2304, 768), (768, 768), (3072, 768), (768, 3072)], 3),
    "Llama-like, 1024": ([(1024, 1024), (256, 1024), (256, 1024), (1024, 1024), *[(2816, 1024)] * 2, (1024, 2816)], 2),
    "square, 1024": ([(1024, 1024)], 6),
}
#: Of the memory that is measured: one matrix larger than a bucket, and many small ones.
LARGE: dict[str, list[tuple[int, int]]] = {"one of 4096 x 2048": [(4096, 2048)], "256 of 256 x 256": [(256, 256)] * 256}
#: Elements that are stepped at once (memopt.partitions.base), and what is allowed above the bound: pages, lists.
BUCKET, SLACK = 4 * 2**20, 4 * 2**20
#: Those of one shape that are multiplied together (memopt.engines.matrices).
BATCH = 2 * 2**20


def parameters(shapes: list[tuple[int, int]], layers: int = 1) -> list[tuple[str, torch.nn.Parameter]]:
    g = torch.Generator().manual_seed(0)
    found = []
    for layer in range(layers):
        for i, shape in enumerate(shapes):
            p = torch.nn.Parameter(torch.randn(shape, generator=g) / 32)
            p.grad = torch.randn(shape, generator=g)
            found.append((f"layers.{layer}.w{i}", p))
    return found


def made(tool: str, named: list[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
    if tool == "torch":
        return torch.optim.Muon([p for _, p in named], 0.02)
    return memopt.create(named, tool, lr=0.02, adjust_lr_fn="original")


def measured(steps: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, one after the other in every round, forwards and backwards in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for n in range(rounds + 1):
        for name in list(steps)[:: -1 if n % 2 else 1]:
            start = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - start)
    return {name: median(found[1:]) for name, found in times.items()}


def best_rate(rounds: int = 10) -> float:
    """Operations a second of the fastest products of this processor that were found."""
    x = torch.randn(2, 1024, 1024).bfloat16()
    found = torch.empty_like(x)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        torch.bmm(x, x, out=found)
        times.append(time.perf_counter() - start)
    return 2 * 2 * 1024**3 / min(times)


def operations(shape: tuple[int, int]) -> int:
    """Of the products that ``muon`` takes for one matrix."""
    with FlopCounterMode(display=False) as counted:
        newton_schulz(torch.randn(1, *shape).bfloat16(), RULES["muon"].hyperparameters)
    return counted.get_total_flops()


def bound(shapes: list[tuple[int, int]]) -> int:
    """Bytes above the state in bfloat16 products: of each element stepped at once its update and what is made of it,
    once more of the largest matrix, and three of its Gram matrix."""
    sizes = [n * m for n, m in shapes]
    largest = max(shapes, key=lambda s: s[0] * s[1])
    together = max(max(sizes), min(sum(sizes), BUCKET))
    batch = max(max(sizes), min(sum(sizes), BATCH))
    return 2 * (2 * together + batch + 3 * batch * min(largest) // max(largest))


def resident(what: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith(what)))


def step_memory(tool: str, name: str) -> int:
    """In a process of its own: bytes by which the second step rises above what is there before it."""
    if tool == PRODUCT:
        return product_memory(*LARGE[name][0])
    named = parameters(LARGE[name])
    return rise(made(tool, named).step)


def product_memory(n: int, m: int) -> int:
    """What a product of an update and a polynomial of its Gram matrix takes besides its result."""
    x, gram = torch.randn(n, m).bfloat16(), torch.randn(m, m).bfloat16()
    found = torch.empty_like(x)
    return rise(lambda: torch.mm(x, gram, out=found))


def rise(work: Callable[[], Any]) -> int:
    work()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is the present one
    work()
    return resident("VmHWM") - before


def memory() -> dict[str, Any]:
    rows = {}
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    for name, shapes in LARGE.items():
        found = {
            tool: int(subprocess.check_output([sys.executable, __file__, "--memory", tool, name], env=environment))
            for tool in ("torch", "muon", "muon-8bit", PRODUCT)
        }
        rows[name] = {"product": found.pop(PRODUCT), "bytes": found, "bound": bound(shapes)}
        print(name, {k: f"{v / 2**20:.1f} MiB" for k, v in rows[name].items() if k != "bytes"}, found)
    return rows


def stepped(name: str, rounds: int) -> dict[str, Any]:
    """One process's seconds, their ratio to torch's, and the best rate of products that it saw."""
    shapes, layers = MODELS[name]
    steps = {tool: made(tool, parameters(shapes, layers)).step for tool in TOOLS}
    seconds = measured(steps, rounds)
    ratio = {tool: round(seconds[tool] / seconds["torch"], 4) for tool in TOOLS[1:]}
    return {"seconds": seconds, "ratio": ratio, "rate": best_rate()}


def row(processes: list[dict[str, Any]]) -> dict[str, Any]:
    def over(key: str, choose: Callable[[Any], float]) -> dict[str, float]:
        return {tool: choose([one[key][tool] for one in processes]) for tool in processes[0][key]}

    seconds = over("seconds", median)
    return {
        "seconds": seconds,
        "ratio": over("ratio", median),
        "least": over("ratio", min),
        "largest": over("ratio", max),
        "rate": max(one["rate"] for one in processes),
    }


def main() -> int:
    parser = ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=9)
    parser.add_argument("--case", help=f"one process: {list(MODELS)}")
    parser.add_argument("--memory", nargs=2, metavar=("TOOL", "CASE"), help=str(list(LARGE)))
    args = parser.parse_args()
    if args.memory:
        print(step_memory(*args.memory))
        return 0
    if args.case:
        print(json.dumps(stepped(args.case, args.rounds)))
        return 0
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in MODELS}
    for _ in range(args.processes):
        for name in MODELS:
            one = [sys.executable, __file__, "--case", name, "--rounds", str(args.rounds)]
            found[name].append(json.loads(subprocess.check_output(one)))
            print(name, found[name][-1]["ratio"], flush=True)
    rows: dict[str, Any] = {name: row(processes) for name, processes in found.items()}
    for name, (shapes, layers) in MODELS.items():
        products = layers * sum(operations(shape) for shape in shapes)
        rows[name]["roof"] = products / rows[name]["rate"] / rows[name]["seconds"]["torch"]
    result = {"threads": torch.get_num_threads(), "bar": BAR, "rows": rows, "memory": memory()}
    within = {
        "time": all(row["ratio"]["muon"] <= BAR for row in rows.values()),
        "memory": all(
            row["bytes"]["muon"] <= row["bound"] + row["product"] + SLACK for row in result["memory"].values()
        ),
    }
    write_result(RESULTS / "muon.json", {**result, "within": within})
    (RESULTS / "muon.md").write_text(page(result))
    print(json.dumps(within))
    return int(not all(within.values()))


def page(result: dict[str, Any]) -> str:
    lines = [
        "| matrices | torch.optim.Muon, ms | " + " | ".join(f"`{tool}`" for tool in TOOLS[1:]) + " | roof |",
        "|---" * 6 + "|",
    ]
    for name, row in result["rows"].items():
        ratios = " | ".join(
            f"{ratio:.2f} ({row['least'][tool]:.2f}–{row['largest'][tool]:.2f})" for tool, ratio in row["ratio"].items()
        )
        lines.append(f"| {name} | {row['seconds']['torch'] * 1e3:.1f} | {ratios} | {row['roof']:.2f} |")
    titles = ("memory above the state, MiB", "torch.optim.Muon", "`muon`", "`muon-8bit`", "bound", "in a product")
    lines += ["", f"| {' | '.join(titles)} |", "|---" * 6 + "|"]
    for name, row in result["memory"].items():
        lines.append(
            f"| {name} | "
            + " | ".join(f"{n / 2**20:.1f}" for n in (*row["bytes"].values(), row["bound"], row["product"]))
            + " |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
