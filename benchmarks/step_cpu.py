"""The time of one optimizer step on a CPU: every rule × format against the libraries around us.

    python benchmarks/step_cpu.py [--numel 16777216] [--rounds 15] [--processes 5] [--threads 2] [--scaling] [--small]

All candidates of a group are interleaved in one process, round after round, and medians are compared, so that the
ratios hold on a machine that does other things too. Where the system happens to put the pages of a process makes
the same step up to 1.4 times slower, torch's as well as ours, so the steps with a bar are measured in several processes
and the median of their ratios is reported, with the smallest and the largest: as it comes, where memopt puts what it
steps on large pages and torch does not; with torch's THP_MEM_ALLOC_ENABLE=1, where everything is on large pages; and
with MEMOPT_HUGE_PAGES=off, where nothing is. Gradients stay where they are, as with zero_grad(set_to_none=False). Bytes
moved are what a step must read and write once: parameter read and written, gradient read (twice where a rule of one
pass looks at it first), state read and written. They are divided by the time and by the bandwidth of a large copy
measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from provenance import write_result
from settled import settle
from step_cpu_table import BARS, SETTINGS, plot, table
from step_libraries import others

import memopt
from memopt import kernels

RESULTS = Path(__file__).parent / "results"
HYPER: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}}
#: Tensors of the parameter's size that a rule reads besides its step: (parameters, gradients or first moments); and
#: moments that it decodes once more.
EXTRA_READS = {"adafactor": (1, 2), "came": (0, 3), "lamb": (1, 1), "stableadamw": (0, 1), "adammini": (0, 1)}
DECODED_TWICE = {"lamb": ("exp_avg", "exp_avg_sq"), "stableadamw": ("exp_avg_sq",)}

Step = Callable[[], Any]
Build = Callable[[], Step]


def ours(spec: str, params: list[torch.nn.Parameter], nonfinite: str) -> Step:
    opt = memopt.create(params, spec, nonfinite=nonfinite, **HYPER.get(memopt.parse(spec).rule, {}))
    opt.init_state()
    settle(opt)
    return opt.step


def moved(spec: str, numel: int, nonfinite: str) -> float:
    """Bytes that a step must read and write, for each of its parameters."""
    rule = memopt.parse(spec).rule
    passes = 3 + sum(EXTRA_READS.get(rule, (0, 0)))
    if rule not in EXTRA_READS:  # the gradient, for the means or to look at it
        passes += memopt.parse(spec).formats[1] == "factored" or nonfinite != "propagate"
    state = memopt.price({"p": shape(numel)}, spec, **HYPER.get(rule, {}))
    again = sum(line.nbytes for line in state if line.moment in DECODED_TWICE.get(rule, ()))
    return 4 * passes + (2 * state.nbytes + again) / numel


def interleaved(steps: dict[str, Step], rounds: int, budget: float = 90.0) -> dict[str, list[float]]:
    """Seconds of each step, one of each per round; the first is a warm-up. Slow ones stop when their share is used."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            if len(times[name]) >= 3 and sum(times[name]) > budget / len(steps):
                continue
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return times


def shape(numel: int) -> tuple[int, int]:
    """A matrix of about this many elements."""
    rows = 1 << (numel.bit_length() // 2)
    return rows, max(numel // rows, 1)


def parameter(numel: int) -> list[torch.nn.Parameter]:
    """One matrix with a gradient."""
    p = torch.nn.Parameter(torch.randn(shape(numel)))
    p.grad = torch.randn_like(p)
    return [p]


def copy_bandwidth(numel: int) -> float:
    """Bytes per second, read and written, of a copy too large for the caches."""
    x, y = torch.randn(numel), torch.empty(numel)
    times = interleaved({"copy": lambda: y.copy_(x)}, 9)["copy"]
    return 8 * numel / statistics.median(times)


def compare(numel: int, rounds: int, brief: bool) -> list[dict[str, Any]]:
    """The table: groups of candidates, each interleaved with torch's fused step and freed before the next."""
    rows: list[dict[str, Any]] = []
    reference = "torch AdamW fused"

    def measure(builds: dict[str, Build], nbytes: dict[str, float]) -> None:
        steps = {reference: torch.optim.AdamW(parameter(numel), fused=True).step}
        steps |= {name: build() for name, build in builds.items()}
        ms = {name: statistics.median(t) * 1e3 for name, t in interleaved(steps, rounds).items()}
        for name in ms:
            if name == reference and any(row["name"] == reference for row in rows):
                continue
            rows.append(
                {
                    "name": name,
                    "ms": ms[name],
                    "ratio": ms[name] / ms[reference],
                    "fused_ms": ms[reference],
                    "bytes_per_parameter": nbytes.get(name),
                }
            )
            print(f"{name:40} {rows[-1]['ms']:8.1f} ms {rows[-1]['ratio']:6.2f}", file=sys.stderr)

    measure({}, {reference: 28.0})
    for spec in [*BARS, *(s for s in specs() if s not in BARS and not brief)]:
        policies = {"propagate": " (propagate)", "skip": ""} if spec in BARS else {"skip": ""}
        builds = {
            f"memopt {spec}{label}": lambda spec=spec, policy=policy: ours(spec, parameter(numel), policy)
            for policy, label in policies.items()
        }
        nbytes = {f"memopt {spec}{label}": moved(spec, numel, policy) for policy, label in policies.items()}
        measure(builds, nbytes)
    if not brief:
        found = others(lambda: parameter(numel))
        measure({name: lambda step=step: step for name, step in found.items()}, {})
    return rows


def elsewhere(args: argparse.Namespace, environment: dict[str, str]) -> list[dict[str, Any]]:
    """The steps with a bar in a process of their own."""
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable,
            __file__,
            "--numel",
            str(args.numel),
            "--rounds",
            str(args.rounds),
            "--brief",
            "--threads",
            str(args.threads),
            "--processes",
            "1",
            "--out",
            out,
        ]
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **environment}
        )
        return json.loads((Path(out) / "step_cpu.json").read_text())["rows"]


def again(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The steps with a bar once more in each of the other processes; medians and all ratios go into ``rows``."""
    found = {row["name"]: [row] for row in rows}
    for _ in range(args.processes - 1):
        for row in elsewhere(args, {}):
            found[row["name"]].append(row)
    for row in rows:
        row["ratios"] = [other["ratio"] for other in found[row["name"]]]
        row["ratio"] = statistics.median(row["ratios"])
        row["ms"] = statistics.median(other["ms"] for other in found[row["name"]])
    if args.processes == 1:
        return
    for setting, environment in SETTINGS.items():
        ratios: dict[str, list[float]] = {}
        for _ in range(args.processes):
            for row in elsewhere(args, environment):
                ratios.setdefault(row["name"], []).append(row["ratio"])
        for row in rows:
            row[setting] = ratios.get(row["name"], [])


def specs() -> list[str]:
    """Every plain rule in every format, on the device, not sharded, without a master."""
    plain = [s for s in memopt.specs() if (s.placement, s.partition, s.master) == ("device", "none", "none")]
    return [str(s) for s in plain]


def small(count: int, numel: int, rounds: int) -> dict[str, float]:
    """Many small tensors: medians in ms."""

    def tensors() -> list[torch.nn.Parameter]:
        params = [torch.nn.Parameter(torch.randn(numel)) for _ in range(count)]
        for p in params:
            p.grad = torch.randn(numel)
        return params

    steps: dict[str, Step] = {"torch AdamW fused": torch.optim.AdamW(tensors(), fused=True).step}
    for spec in ("adamw", "adamw-8bit", "lion-8bit", "adafactor"):
        steps[f"memopt {spec}"] = ours(spec, tensors(), "skip")
    return {name: statistics.median(t) * 1e3 for name, t in interleaved(steps, rounds).items()}


def scaling(largest: int, rounds: int) -> dict[str, dict[int, float]]:
    """Step time in ms against the number of parameters, by factors of eight from 1 K; one candidate at a time, so that
    a billion parameters fit into 16 GB."""
    builds: dict[str, Callable[[int], Step]] = {
        "torch AdamW fused": lambda numel: torch.optim.AdamW(parameter(numel), fused=True).step
    }
    for spec in ("adamw-8bit", "adamw-4bit", "adafactor"):
        builds[f"memopt {spec}"] = lambda numel, spec=spec: ours(spec, parameter(numel), "skip")
    curves: dict[str, dict[int, float]] = {name: {} for name in builds}
    sizes = [1 << bits for bits in range(10, 64, 3) if 1 << bits < largest]
    for numel in (*sizes, largest):
        for name, build in builds.items():
            times = interleaved({name: build(numel)}, rounds if numel < 1 << 26 else 3)
            curves[name][numel] = statistics.median(times[name]) * 1e3
        print(f"{numel:,} parameters", file=sys.stderr)
    return curves


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--numel", type=int, default=1 << 24, help="parameters of the table (default 16.8 M)")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each candidate")
    parser.add_argument("--processes", type=int, default=5, help="processes that measure the steps with a bar")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--largest", type=int, default=1 << 30, help="end of the curve; 16 bytes of memory for each")
    parser.add_argument("--brief", action="store_true", help="only the steps that have a bar")
    parser.add_argument("--scaling", action="store_true", help="also step time against size, from 1 K")
    parser.add_argument("--small", action="store_true", help="also 500 tensors of 1000 elements")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where step_cpu.json and step_cpu.md are written")


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {
        "numel": args.numel,
        "threads": args.threads,
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
        "kernels": kernels.status().partition(", from")[0],
        "copy_bandwidth": copy_bandwidth(args.numel),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    report["rows"] = compare(args.numel, args.rounds, args.brief)
    again(args, report["rows"])
    if args.small:
        report["small"] = small(500, 1000, 4 * args.rounds)
    if args.scaling:
        report["scaling"] = scaling(args.largest, args.rounds)
    report["load_after"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    args.out.mkdir(parents=True, exist_ok=True)
    write_result(args.out / "step_cpu.json", report)
    (args.out / "step_cpu.md").write_text(table(report))
    if args.scaling:
        plot(report["scaling"], args.out / "step_cpu.png")
    print(table(report))
    return 0


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(arguments)
    sys.exit(run(arguments.parse_args()))
