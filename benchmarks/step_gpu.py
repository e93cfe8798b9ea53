"""Time and memory of one optimizer step on one GPU: every rule × format × dtype against the libraries around us.

    python benchmarks/step_gpu.py                 # 1.2 B parameters where the card has room for them; under 8 minutes
    python benchmarks/step_gpu.py --brief --numel 100000000

In a checkout where memopt is not installed: PYTHONPATH=. before it.

Correctness first: before a spec is timed it takes three steps in the kernels and three on the plain torch path, which
must agree. The parameters have the shapes of Llama-3.2-1B, or of Llama-3.1-8B with as many layers as fit. Times are
medians of CUDA events around a step, after warm-up, candidates one after the other (each owns the memory alone). Bytes
moved are what a step must read and write once: parameter read and written, gradient read (once more where it is looked
at first), state read and written, and what a rule reads besides. Their rate is divided by that of a large copy in the
same process. Peak memory is above parameters, gradients and state, during one step.

A candidate that fails (no memory, say) is left out with the reason, and what was measured is written after each one;
when the device itself has failed nothing more can be, and the run ends there.

Not yet run on a GPU: there are no results.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from provenance import write_result
from step_gpu_peers import Build, Step, others, said
from step_gpu_table import table

import memopt

RESULTS = Path(__file__).parent / "results"
HYPER: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}}
#: Tensors of the parameter's size that a rule reads besides its step: (parameters, gradients, fp32 first moments); and
#: moments that it decodes once more.
EXTRA_READS = {
    "adafactor": (1, 2, 0),
    "came": (0, 2, 1),
    "lamb": (1, 1, 0),
    "stableadamw": (0, 1, 0),
    "adammini": (0, 1, 0),
}
DECODED_TWICE = {"lamb": ("exp_avg", "exp_avg_sq"), "stableadamw": ("exp_avg_sq",)}
#: Timed under both policies, and first, so that they are there whatever the time.
MAIN = ("adamw", "adamw-8bit", "adamw-4bit", "adafactor")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Parameters agree with the plain path to this, of their largest; 16-bit ones to one step of theirs.
TOLERANCE, STEP = 5e-6, {torch.float32: 0.0, torch.bfloat16: 2.0**-7}
#: Rows of whole blocks and not, aligned and not, vectors, a stack: whatever the timed shapes are compiled for is here.
CHECKED = [(512, 1024), (300, 770), (5000,), (2048,), (3, 128, 256)]
DEVICE = "cuda"


class Failed(Exception):
    """The device has; every call to it from now on would."""


def llama(numel: int) -> list[tuple[int, ...]]:
    """Shapes of Llama-3.2-1B up to its size, else of Llama-3.1-8B, with as many layers as stay within ``numel``."""
    small = numel < 2_000_000_000
    hidden, ffn, kv, vocabulary = (2048, 8192, 512, 128256) if small else (4096, 14336, 1024, 128256)
    layer: list[tuple[int, ...]] = [
        (hidden, hidden),
        (kv, hidden),
        (kv, hidden),
        (hidden, hidden),
        (ffn, hidden),
        (ffn, hidden),
        (hidden, ffn),
        (hidden,),
        (hidden,),
    ]
    size = sum(torch.Size(s).numel() for s in layer)
    embedding = [(vocabulary, hidden)] if numel > 2 * vocabulary * hidden else []
    left = numel - vocabulary * hidden * len(embedding)
    return [*embedding, *(layer * max(int(left // size), 1)), (hidden,)]


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Parameters with gradients of many magnitudes; the same for the same arguments."""
    g = torch.Generator(device=DEVICE).manual_seed(0)
    params = []
    for shape in shapes:
        p = torch.nn.Parameter(torch.randn(shape, device=DEVICE, dtype=dtype, generator=g).mul_(0.02))
        p.grad = torch.randn(shape, device=DEVICE, dtype=dtype, generator=g).mul_(1e-3)
        params.append(p)
    return params


def ours(spec: str, nonfinite: str, params: list[torch.nn.Parameter]) -> Step:
    hyper = HYPER.get(memopt.parse(spec).rule, {})
    opt = memopt.create(params, spec, nonfinite=nonfinite, capturable=nonfinite == "skip", **hyper)
    opt.init_state()
    return opt.step


def moved(spec: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, nonfinite: str) -> float:
    """Bytes that a step must read and write, for each parameter."""
    rule = memopt.parse(spec).rule
    p, g, m = EXTRA_READS.get(rule, (0, 0, 0))
    looked = nonfinite != "propagate"
    state = memopt.price(shapes, spec, **HYPER.get(rule, {}))
    again = sum(line.nbytes for line in state if line.moment in DECODED_TWICE.get(rule, ()))
    numel = sum(torch.Size(s).numel() for s in shapes)
    return dtype.itemsize * (3 + p + g + looked) + 4 * m + (2 * state.nbytes + again) / numel


def check(spec: str, dtype: torch.dtype) -> str:
    """Empty where kernels and plain path agree after three steps each, else what differs."""
    from memopt.kernels.triton import available as triton

    results = []
    for devices in ({DEVICE}, set()):
        kept, triton.DEVICES = triton.DEVICES, devices
        try:
            params = parameters(CHECKED, dtype)
            opt = memopt.create(params, spec, **HYPER.get(memopt.parse(spec).rule, {}))
            for _ in range(3):
                opt.step()
            results.append([p.detach().double() for p in params])
            if devices and type(opt.stepper.plan).__module__ != "memopt.kernels.triton.cached_step":
                return f"the kernels did not step it: {opt.explain()}"
        finally:
            triton.DEVICES = kept
    for shape, a, b in zip(CHECKED, *results, strict=True):
        off = int(((a - b).abs() > TOLERANCE * b.abs().max() + STEP[dtype] * b.abs()).sum())
        # Codes that were ties are one step off, a few in a million.
        if off > 1e-4 * a.numel() + 2 or not bool(a.isfinite().all()):
            return f"{shape}: {off} of {a.numel()} parameters differ, at most by {float((a - b).abs().max()):.2e}"
    return ""


def timed(step: Step, rounds: int, budget: float) -> float:
    """Median milliseconds of a step between CUDA events."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < rounds and (len(times) < 5 or time.perf_counter() - start < budget):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        step()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after))
    return statistics.median(times)


def measure(
    build: Build, shapes: list[tuple[int, ...]], dtype: torch.dtype, rounds: int, budget: float
) -> dict[str, Any]:
    """Time and peak memory of one candidate, alone on the card."""
    gc.collect()
    torch.cuda.empty_cache()
    params = parameters(shapes, dtype)
    step = build(params)
    step()
    torch.cuda.synchronize()
    resident = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - resident
    return {"ms": timed(step, rounds, budget), "peak_above_state": peak}


def copy_bandwidth(numel: int) -> float:
    """Bytes per second, read and written, of a copy too large for the caches."""
    x, y = torch.ones(numel, device=DEVICE), torch.empty(numel, device=DEVICE)
    return 8 * numel / (timed(lambda: y.copy_(x), 30, 5.0) / 1e3)


def specs() -> list[str]:
    every = [s for s in memopt.specs() if (s.placement, s.partition, s.master) == ("device", "none", "none")]
    return [str(s) for s in every if str(s) not in MAIN]


class Comparison:
    """Rows of the report, each written as soon as it is there."""

    def __init__(self, report: dict[str, Any], args: argparse.Namespace, deadline: float) -> None:
        self.report, self.args, self.deadline = report, args, deadline
        self.shapes = llama(int(min(args.numel, room())))
        report["numel"] = sum(torch.Size(s).numel() for s in self.shapes)
        report["tensors"], report["rows"] = len(self.shapes), []
        self._wrong: dict[tuple[str, str], str] = {}

    def run(self) -> None:
        self.report["copy_bandwidth"] = copy_bandwidth(self.args.copied)
        for dtype in DTYPES:
            for spec in MAIN:
                for policy in ("propagate", "skip"):
                    self.add_ours(spec, dtype, policy)
            for name, build in others():
                self.add(name, dtype, partial(self._measured, build, dtype))
        for spec in [] if self.args.brief else specs():
            for dtype in DTYPES:
                self.add_ours(spec, dtype, "skip")

    def add_ours(self, spec: str, dtype: str, policy: str) -> None:
        def found() -> dict[str, Any]:
            if (spec, dtype) not in self._wrong:
                self._wrong[spec, dtype] = check(spec, DTYPES[dtype])
            if self._wrong[spec, dtype]:
                return {"agrees": False, "left_out": f"WRONG: {self._wrong[spec, dtype]}"}
            nbytes = moved(spec, self.shapes, DTYPES[dtype], policy)
            return {**self._measured(partial(ours, spec, policy), dtype), "agrees": True, "bytes_per_parameter": nbytes}

        self.add(f"memopt {spec}" + (" (propagate)" if policy == "propagate" else ""), dtype, found)

    def _measured(self, build: Build | str, dtype: str) -> dict[str, Any]:
        if isinstance(build, str):
            return {"left_out": build}
        found = measure(build, self.shapes, DTYPES[dtype], self.args.rounds, self.args.seconds)
        return {**found, "bytes_per_parameter": None}

    def add(self, name: str, dtype: str, found: Callable[[], dict[str, Any]]) -> None:
        failed: str | None = None
        if time.monotonic() > self.deadline:
            row = {"left_out": "left out: no time was left"}
        else:
            try:
                row = found()
            except Exception as error:
                row = {"left_out": said(error)}
            try:
                torch.cuda.synchronize()
            except Exception as error:
                failed = said(error)
                row = {"left_out": failed}
        self.report["rows"].append({"name": name, "dtype": dtype, **row})
        print(self.report["rows"][-1], file=sys.stderr, flush=True)
        if failed is not None:
            self.report["stopped"] = f"the device failed at {name} on {dtype}"
        self.write()
        if failed is not None:
            raise Failed(self.report["stopped"])

    def write(self) -> None:
        self.args.out.mkdir(parents=True, exist_ok=True)
        write_result(self.args.out / "step_gpu.json", self.report)
        (self.args.out / "step_gpu.md").write_text(table(self.report))


def room() -> float:
    """Parameters for which there is memory: fp32, gradient and fp32 state of three moments, with a tenth to spare."""
    return torch.cuda.mem_get_info()[0] * 0.9 / 20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=1_236_000_000, help="parameters, about (default those of 1B)")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each candidate, fewer where they are slow")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing for each candidate")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which what is left is left out")
    parser.add_argument("--copied", type=int, default=1 << 28, help="fp32 numbers of the copy that measures bandwidth")
    parser.add_argument("--brief", action="store_true", help="only the main specs and the other libraries")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where step_gpu.json and step_gpu.md are written")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.minutes * 60
    if not torch.cuda.is_available():
        print("step_gpu.py needs a CUDA device, and torch sees none here.", file=sys.stderr)
        return 1
    from memopt.kernels.triton import available as triton

    reason = triton.missing("cuda")
    if reason:
        print(f"step_gpu.py needs the Triton kernels: {reason}.", file=sys.stderr)
        return 1
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.version(),
    }
    try:
        Comparison(report, args, deadline).run()
    except Failed as failed:
        print(f"step_gpu.py stops: {failed}", file=sys.stderr)
    print(table(report))
    wrong = [row for row in report["rows"] if row.get("agrees") is False]
    return 1 if wrong or "stopped" in report else 0


if __name__ == "__main__":
    sys.exit(main())
