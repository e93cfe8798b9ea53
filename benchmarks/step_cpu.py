"""The time of one optimizer step on a CPU: every rule × format against the libraries around us.

    python benchmarks/step_cpu.py [--numel 16777216] [--rounds 15] [--threads 2] [--scaling] [--small] [--out DIR]

All candidates of a group are interleaved in one process, round after round, and medians are compared, so that the
ratios hold on a machine that does other things too. Bytes moved are what a step must read and write once: parameter
read and written, gradient read (twice where it is looked at first), state read and written. They are divided by the
time and by the bandwidth of a large copy measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import memopt
from memopt import kernels

RESULTS = Path(__file__).parent / "results"
#: Bars of the issue, as ratios to torch's fused AdamW.
BARS = {"adamw-8bit": 0.9, "lion-8bit": 0.8, "adamw-4bit": 1.1, "adamw-bf16": 0.9, "adamw": 1.0, "adafactor": 1.5,
        "came": 2.0}  # fmt: skip
HYPER: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}}
#: Tensors of the parameter's size that a rule reads besides its step: (parameters, gradients or first moments).
EXTRA_READS = {"adafactor": (1, 2), "came": (0, 3)}

Step = Callable[[], Any]


def ours(spec: str, params: list[torch.nn.Parameter], nonfinite: str) -> tuple[Step, float]:
    """A step and the bytes that it must move."""
    opt = memopt.create(params, spec, nonfinite=nonfinite, **HYPER.get(memopt.parse(spec).rule, {}))
    opt.init_state()
    n, rule = sum(p.numel() for p in params), memopt.parse(spec).rule
    reads = EXTRA_READS.get(rule, (0, 0))
    passes = 3 + sum(reads) + (nonfinite != "propagate")
    return opt.step, 4 * n * passes + 2 * opt.ledger().nbytes


def others(params: Callable[[], list[torch.nn.Parameter]]) -> dict[str, Step]:
    """Steps of the libraries that are installed."""
    found: dict[str, Callable[[], Any]] = {
        "torch AdamW foreach": lambda: torch.optim.AdamW(params(), foreach=True),
        "torch Adafactor": lambda: torch.optim.Adafactor(params()),
    }
    try:
        import bitsandbytes as bnb

        found["bitsandbytes AdamW32bit"] = lambda: bnb.optim.AdamW32bit(params())
        found["bitsandbytes AdamW8bit"] = lambda: bnb.optim.AdamW8bit(params())
        found["bitsandbytes Lion8bit"] = lambda: bnb.optim.Lion8bit(params())
    except ImportError:
        pass
    try:
        from torchao import optim as ao

        found["torchao AdamW8bit"] = lambda: ao.AdamW8bit(params())
        found["torchao AdamW4bit"] = lambda: ao.AdamW4bit(params())
    except ImportError:
        pass
    try:
        from transformers.optimization import Adafactor

        found["transformers Adafactor"] = lambda: Adafactor(params())
    except ImportError:
        pass
    try:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        found["DeepSpeedCPUAdam"] = lambda: DeepSpeedCPUAdam(params())
    except ImportError:
        pass
    steps: dict[str, Step] = {}
    for name, build in found.items():
        try:
            step = build().step
            step()
            steps[name] = step
        except Exception as error:  # a library that cannot build its extension here is left out, and said so
            print(f"left out: {name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}", file=sys.stderr)
    return steps


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


def parameter(numel: int) -> list[torch.nn.Parameter]:
    """One matrix of about this many elements, with a gradient."""
    rows = 1 << (numel.bit_length() // 2)
    p = torch.nn.Parameter(torch.randn(rows, max(numel // rows, 1)))
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
    specs = [str(s) for s in memopt.specs() if (s.master, s.placement, s.partition) == ("none", "device", "none")]

    def measure(steps: dict[str, Step], moved: dict[str, float]) -> None:
        fused = torch.optim.AdamW(parameter(numel), fused=True)
        times = interleaved({reference: fused.step, **steps}, rounds)
        base = statistics.median(times[reference])
        for name, seconds in times.items():
            if name == reference and any(row["name"] == reference for row in rows):
                continue
            median = statistics.median(seconds)
            rows.append({
                "name": name, "ms": median * 1e3, "ratio": median / base, "fused_ms": base * 1e3,
                "rounds": len(seconds), "bytes_per_parameter": moved.get(name, 0) / numel or None,
            })  # fmt: skip

    measure({}, {reference: 28.0 * numel})
    chosen = [s for s in specs if memopt.parse(s).rule != "sgd" or memopt.parse(s).format != "factored"]
    for spec in [*BARS, *(s for s in chosen if s not in BARS and not brief)]:
        steps, moved = {}, {}
        for policy in ("propagate", "skip") if spec in BARS else ("skip",):
            name = f"memopt {spec}" + (" (propagate)" if policy == "propagate" else "")
            steps[name], moved[name] = ours(spec, parameter(numel), policy)
        measure(steps, moved)
        print(f"{rows[-1]['name']:40} {rows[-1]['ms']:8.1f} ms {rows[-1]['ratio']:6.2f}", file=sys.stderr)
    if not brief:
        measure(others(lambda: parameter(numel)), {})
    return rows


def small(count: int, numel: int, rounds: int) -> dict[str, float]:
    """Many small tensors: medians in ms."""

    def tensors() -> list[torch.nn.Parameter]:
        params = [torch.nn.Parameter(torch.randn(numel)) for _ in range(count)]
        for p in params:
            p.grad = torch.randn(numel)
        return params

    steps: dict[str, Step] = {"torch AdamW fused": torch.optim.AdamW(tensors(), fused=True).step}
    for spec in ("adamw", "adamw-8bit", "lion-8bit", "adafactor"):
        steps[f"memopt {spec}"] = ours(spec, tensors(), "skip")[0]
    return {name: statistics.median(t) * 1e3 for name, t in interleaved(steps, rounds).items()}


def scaling(largest: int, rounds: int) -> dict[str, dict[int, float]]:
    """Step time in ms against the number of parameters, by factors of eight from 1 K."""
    curves: dict[str, dict[int, float]] = {}
    numel = 1 << 10
    while numel <= largest:
        steps: dict[str, Step] = {"torch AdamW fused": torch.optim.AdamW(parameter(numel), fused=True).step}
        for spec in ("adamw-8bit", "adamw-4bit", "adafactor"):
            steps[f"memopt {spec}"] = ours(spec, parameter(numel), "skip")[0]
        for name, t in interleaved(steps, rounds if numel < 1 << 26 else 3).items():
            curves.setdefault(name, {})[numel] = statistics.median(t) * 1e3
        numel *= 8
    return curves


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    bandwidth = report["copy_bandwidth"]
    lines = [
        f"{report['numel']:,} fp32 parameters, {report['threads']} threads, torch {report['torch']}, {report['cpu']}; "
        f"copy {bandwidth / 1e9:.0f} GB/s; {report['kernels']}. Load average {report['load_before']:.1f} before and "
        f"{report['load_after']:.1f} after; ratios are to the fused step of the same rounds.",
        "",
        "| step | ms | ratio to fused AdamW | bar | bytes per parameter | of copy bandwidth |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        moved = row["bytes_per_parameter"]
        bar = BARS.get(row["name"].removeprefix("memopt ").removesuffix(" (propagate)"), "")
        share = f"{moved * report['numel'] / (row['ms'] / 1e3) / bandwidth:.0%}" if moved else ""
        lines.append(f"| {row['name']} | {row['ms']:.1f} | {row['ratio']:.2f} | {bar} | "
                     f"{f'{moved:.1f}' if moved else ''} | {share} |")  # fmt: skip
    if "small" in report:
        base = report["small"]["torch AdamW fused"]
        lines += ["", "500 tensors of 1000 elements:", "", "| step | ms | ratio |", "|---|---:|---:|"]
        lines += [f"| {name} | {ms:.2f} | {ms / base:.2f} |" for name, ms in report["small"].items()]
    if "scaling" in report:
        sizes = list(next(iter(report["scaling"].values())))
        head = " | ".join(f"{int(n):,}" for n in sizes)
        lines += ["", "Milliseconds against parameters:", "", f"| step | {head} |", "|---|" + "---:|" * len(sizes)]
        lines += [f"| {name} | " + " | ".join(f"{ms:.3g}" for ms in curve.values()) + " |"
                  for name, curve in report["scaling"].items()]  # fmt: skip
    return "\n".join(lines) + "\n"


def plot(curves: dict[str, dict[int, float]], path: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    for name, curve in curves.items():
        pyplot.loglog([int(n) for n in curve], list(curve.values()), marker="o", label=name)
    pyplot.xlabel("parameters")
    pyplot.ylabel("ms per step")
    pyplot.legend()
    pyplot.savefig(path, dpi=120)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--numel", type=int, default=1 << 24, help="parameters of the table (default 16.8 M)")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each candidate")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--largest", type=int, default=1 << 28, help="end of the curve; 25 bytes of memory for each")
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
    if args.small:
        report["small"] = small(500, 1000, 4 * args.rounds)
    if args.scaling:
        report["scaling"] = scaling(args.largest, args.rounds)
    report["load_after"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "step_cpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "step_cpu.md").write_text(table(report))
    if args.scaling:
        plot(report["scaling"], args.out / "step_cpu.png")
    print(table(report))
    return 0


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(arguments)
    sys.exit(run(arguments.parse_args()))
