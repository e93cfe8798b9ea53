"""What a `/zero1` step costs on two processes against its parts, measured in one run, interleaved.

    python benchmarks/zero1_step.py            writes benchmarks/results/zero1_step.json and .md

The bar: a step takes at most 1.2 times what half the state's step and the all-gather alone take, one after the other.
Half the step is `memopt.create` on this rank's rows as tensors of their own; the all-gather is that of the step's own
buckets with nothing computed.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import memopt
from memopt.partitions.base import owned

sys.path.insert(0, str(Path(__file__).parent.parent))
from provenance import write_result

from tests.helpers import ranks

BAR = 1.2
SPECS = ("adamw", "adamw-8bit")


def measure(spec: str, layers: int, width: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each part in each round."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    parameters = list(model.parameters())
    opt = memopt.create(model, f"{spec}/zero1")
    mine = [nn.Parameter(owned(p.detach(), opt.partition.local_rows(p)).clone()) for p in parameters]
    half = memopt.create(mine, spec)
    for p, q in zip(parameters, mine, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = owned(p.grad, opt.partition.local_rows(p)).clone()

    def gather() -> None:
        for first, stop in opt.partition.buckets(parameters):
            opt.partition.all_gather_begin(parameters[first:stop])
        opt.partition.all_gather_wait()

    with torch.no_grad():
        return _timed({"step": opt.step, "half": half.step, "gather": gather}, rounds)


def _timed(works: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in works}
    for i in range(rounds + 2):
        for name, work in works.items():
            dist.barrier()
            started = perf_counter()
            work()
            dist.barrier()
            if i >= 2:
                found[name].append(perf_counter() - started)
    return found


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    rows = []
    for spec in SPECS:
        figures = ranks.run(measure, 2, spec, args.layers, args.width, args.rounds)[0]
        ratios = [s / (h + g) for s, h, g in zip(figures["step"], figures["half"], figures["gather"], strict=True)]
        rows.append(
            {
                "spec": f"{spec}/zero1",
                "ratio": median(ratios),
                **{f"{name}_ms": 1000 * median(seconds) for name, seconds in figures.items()},
            }
        )
    record = {"layers": args.layers, "width": args.width, "rounds": args.rounds, "bar": BAR, "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    write_result(args.out / "zero1_step.json", record)
    (args.out / "zero1_step.md").write_text(page(record))
    print(page(record))
    return 1 if any(row["ratio"] > BAR for row in rows) else 0


def page(record: dict[str, Any]) -> str:
    lines = [
        "# A `/zero1` step on two processes",
        "",
        f"{record['layers']} layers of {record['width']}², gloo, one thread each; medians of {record['rounds']} rounds "
        f"in which the three take turns. The bar is {record['bar']}. Written by `benchmarks/zero1_step.py`.",
        "",
        "| spec | step, ms | half the state's step, ms | all-gather, ms | step / (half + all-gather) |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{r['spec']}` | {r['step_ms']:.1f} | {r['half_ms']:.1f} | {r['gather_ms']:.1f} | {r['ratio']:.2f} |"
        for r in record["rows"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
