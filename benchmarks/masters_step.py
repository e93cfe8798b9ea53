"""What a master costs in time: the CPU step of bf16 weights with each, relative to the step without one.

    python benchmarks/masters_step.py       writes benchmarks/results/masters_step.json and masters_step.md

One thread, steps of all masters interleaved in one process, the least CPU time of each.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path
from time import process_time

import torch
from provenance import write_result

import memopt
from memopt import kernels
from memopt.masters import MASTERS

RULES = ("adamw", "adamw-8bit", "lion-8bit", "sgd", "adafactor")
RESULTS = Path(__file__).parent / "results"


def measure(size: int, repeats: int) -> dict[str, dict[str, float]]:
    """rule -> master -> nanoseconds per parameter."""
    torch.set_num_threads(1)
    optimizers = {}
    for rule in RULES:
        for master in MASTERS:
            weight = torch.nn.Parameter(torch.randn(size, size).bfloat16())
            weight.grad = torch.randn(size, size).bfloat16()
            opt = memopt.create([weight], memopt.parse(rule).replace(master=master), nonfinite="propagate", lr=1e-5)
            if "stepped by" in opt.explain():
                raise RuntimeError(f"{opt.spec} is not stepped by a kernel: {opt.explain()}")
            opt.step()
            optimizers[rule, master] = opt
    best = dict.fromkeys(optimizers, float("inf"))
    for _ in range(repeats):
        for key, opt in optimizers.items():
            begun = process_time()
            opt.step()
            best[key] = min(best[key], process_time() - begun)
    return {rule: {m: 1e9 * best[rule, m] / size**2 for m in MASTERS} for rule in RULES}


def page(record: dict) -> str:
    """The results as Markdown."""
    lines = [
        "# Time of a step with a master",
        "",
        f"{record['numel']:,} bf16 parameters, one thread, {record['kernels']}. CPU time per parameter without a "
        "master, and the ratio to it with each: the least of interleaved steps in one process.",
        "",
        "| rule | none | " + " | ".join(f"+{m}" for m in MASTERS if m != "none") + " |",
        "|---|" + "--:|" * len(MASTERS),
    ]
    for rule, times in record["nanoseconds"].items():
        ratios = " | ".join(f"{times[m] / times['none']:.2f}" for m in MASTERS if m != "none")
        lines.append(f"| {rule} | {times['none']:.2f} ns | {ratios} |")
    lines += ["", f"Made by `benchmarks/masters_step.py` with torch {record['torch']}.", ""]
    return "\n".join(lines)


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the one weight")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for masters_step.json and masters_step.md")
    args = parser.parse_args()
    if kernels.library() is None:
        print(f"there are no kernels to measure: {kernels.missing()}", file=sys.stderr)
        return 1
    record = {
        "numel": args.size**2,
        "kernels": f"C++ kernels for {kernels.library().isa}",
        "torch": torch.__version__,
        "nanoseconds": measure(args.size, args.repeats),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_result(args.out / "masters_step.json", record)
    (args.out / "masters_step.md").write_text(page(record))
    print(page(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
