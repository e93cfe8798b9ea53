"""Time and memory of one optimizer step on one GPU: every rule × format × dtype against the libraries around us.

    python benchmarks/step_gpu.py                 # 1.2 B parameters where the card has room for them; under 8 minutes
    python benchmarks/step_gpu.py --brief --numel 100000000

In a checkout where memopt is not installed: PYTHONPATH=. before it.

Correctness first: each spec takes two steps in the kernels and two on the plain torch path, and must agree, before
anything is timed. The parameters have the shapes of Llama-3.2-1B, or of Llama-3.1-8B with as many layers as fit. Times
are medians of CUDA events around a step, after warm-up, candidates one after the other (each owns the memory alone).
Bytes moved are what a step must read and write once: parameter read and written, gradient read (once more where it is
looked at first), state read and written, and what a rule reads besides. Their rate is divided by that of a large copy
in the same process. Peak memory is above parameters, gradients and state, during one step.

Not yet run on a GPU: there are no results.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import memopt

RESULTS = Path(__file__).parent / "results"
HYPER: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}}
#: Tensors of the parameter's size that a rule reads besides its step: (parameters, gradients, fp32 first moments); and
#: moments that it decodes once more.
EXTRA_READS = {
    "adafactor": (1, 2, 0), "came": (0, 2, 1), "lamb": (1, 1, 0), "stableadamw": (0, 1, 0), "adammini": (0, 1, 0),
}  # fmt: skip
DECODED_TWICE = {"lamb": ("exp_avg", "exp_avg_sq"), "stableadamw": ("exp_avg_sq",)}
#: Timed under both policies, and first, so that they are there whatever the time.
MAIN = ("adamw", "adamw-8bit", "adamw-4bit", "adafactor")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Parameters agree with the plain path to this, of their largest; 16-bit ones to one step of theirs.
TOLERANCE, STEP = 5e-6, {torch.float32: 0.0, torch.bfloat16: 2.0**-7}

Step = Callable[[], Any]


def llama(numel: int) -> list[tuple[int, ...]]:
    """Shapes of Llama-3.2-1B up to its size, else of Llama-3.1-8B, with as many layers as stay within ``numel``."""
    small = numel < 2_000_000_000
    hidden, ffn, kv, vocabulary = (2048, 8192, 512, 128256) if small else (4096, 14336, 1024, 128256)
    layer: list[tuple[int, ...]] = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden), (ffn, hidden),
                                    (ffn, hidden), (hidden, ffn), (hidden,), (hidden,)]  # fmt: skip
    size = sum(torch.Size(s).numel() for s in layer)
    embedding = [(vocabulary, hidden)] if numel > 2 * vocabulary * hidden else []
    left = numel - vocabulary * hidden * len(embedding)
    return [*embedding, *(layer * max(int(left // size), 1)), (hidden,)]


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Parameters with gradients of many magnitudes; the same for the same arguments."""
    g = torch.Generator(device="cuda").manual_seed(0)
    params = []
    for shape in shapes:
        p = torch.nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype, generator=g).mul_(0.02))
        p.grad = torch.randn(shape, device="cuda", dtype=dtype, generator=g).mul_(1e-3)
        params.append(p)
    return params


def ours(spec: str, params: list[torch.nn.Parameter], nonfinite: str) -> Step:
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


# Correctness ---------------------------------------------------------------------------------------------------------


def check(spec: str, dtype: torch.dtype) -> str:
    """Empty where kernels and plain path agree after two steps each, else what differs."""
    from memopt.kernels import triton

    shapes = [(512, 1024), (300, 770), (5000,), (64,), (3, 128, 256)]
    results = []
    for devices in ({"cuda"}, set()):
        kept, triton.DEVICES = triton.DEVICES, devices
        try:
            params = parameters(shapes, dtype)
            opt = memopt.create(params, spec, **HYPER.get(memopt.parse(spec).rule, {}))
            for _ in range(3):
                opt.step()
            results.append([p.detach().double() for p in params])
            if devices and type(opt._plan).__module__ != "memopt.kernels.triton.plan":
                return f"the kernels did not step it: {opt.explain()}"
        finally:
            triton.DEVICES = kept
    for shape, a, b in zip(shapes, *results, strict=True):
        off = int(((a - b).abs() > TOLERANCE * b.abs().max() + STEP[dtype] * b.abs()).sum())
        # Codes that were ties are one step off, a few in a million.
        if off > 1e-4 * a.numel() + 2 or not bool(a.isfinite().all()):
            return f"{shape}: {off} of {a.numel()} parameters differ, at most by {float((a - b).abs().max()):.2e}"
    return ""


# Timing --------------------------------------------------------------------------------------------------------------


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


def measure(build: Callable[[list[torch.nn.Parameter]], Step], shapes: list[tuple[int, ...]], dtype: torch.dtype,
            args: argparse.Namespace) -> dict[str, Any]:  # fmt: skip
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
    return {"ms": timed(step, args.rounds, args.seconds), "peak_above_state": peak}


def copy_bandwidth(numel: int) -> float:
    """Bytes per second, read and written, of a copy too large for the caches."""
    x, y = torch.randn(numel, device="cuda"), torch.empty(numel, device="cuda")
    return 8 * numel / (timed(lambda: y.copy_(x), 30, 5.0) / 1e3)


def others() -> dict[str, Callable[[list[torch.nn.Parameter]], Step]]:
    """Steps of the libraries that are installed."""
    found: dict[str, Callable[[list[torch.nn.Parameter]], Step]] = {
        "torch AdamW fused": lambda p: torch.optim.AdamW(p, fused=True).step,
        "torch AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True).step,
        "torch Adafactor foreach": lambda p: torch.optim.Adafactor(p, foreach=True).step,
    }
    try:
        import bitsandbytes as bnb

        for name in ("AdamW32bit", "AdamW8bit", "Lion8bit"):
            found[f"bitsandbytes {name}"] = lambda p, name=name: getattr(bnb.optim, name)(p).step
        found["memopt adamw-8bit, engine bitsandbytes"] = lambda p: memopt.create(
            p, "adamw-8bit", engine="bitsandbytes", nonfinite="propagate").step  # fmt: skip
    except Exception as error:
        print(f"left out: bitsandbytes: {error}", file=sys.stderr)
    try:
        from torchao import optim as ao

        for name in ("AdamW8bit", "AdamW4bit"):
            found[f"torchao {name}"] = lambda p, name=name: getattr(ao, name)(p).step
    except Exception as error:
        print(f"left out: torchao: {error}", file=sys.stderr)
    try:
        import flashoptim

        found["flashoptim FlashAdamW"] = lambda p: flashoptim.FlashAdamW(p).step
    except Exception as error:
        print(f"left out: flashoptim: {error}", file=sys.stderr)
    return found


def specs(brief: bool) -> list[str]:
    """The main ones, then every other rule × format."""
    every = [s for s in memopt.specs() if (s.placement, s.partition, s.master) == ("device", "none", "none")]
    names = [str(s) for s in every]
    return [*MAIN, *(s for s in names if s not in MAIN and not brief)]


def compare(args: argparse.Namespace, shapes: list[tuple[int, ...]], deadline: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def add(name: str, dtype: str, build: Callable[[list[torch.nn.Parameter]], Step], nbytes: float | None) -> None:
        if time.monotonic() > deadline:
            rows.append({"name": name, "dtype": dtype, "left_out": "no time was left"})
            return
        try:
            found = measure(build, shapes, DTYPES[dtype], args)
        except Exception as error:
            rows.append({"name": name, "dtype": dtype, "left_out": f"{type(error).__name__}: {str(error)[:160]}"})
        else:
            rows.append({"name": name, "dtype": dtype, **found, "bytes_per_parameter": nbytes})
        print(rows[-1], file=sys.stderr, flush=True)

    def add_ours(spec: str, dtype: str, policy: str) -> None:
        label = f"memopt {spec}" + (" (propagate)" if policy == "propagate" else "")
        nbytes = moved(spec, shapes, DTYPES[dtype], policy)
        add(label, dtype, lambda p: ours(spec, p, policy), nbytes)

    for dtype in DTYPES:
        for spec in MAIN:
            for policy in ("propagate", "skip"):
                add_ours(spec, dtype, policy)
        for name, build in others().items():
            add(name, dtype, build, None)
    for dtype in DTYPES:
        for spec in specs(args.brief)[len(MAIN) :]:
            add_ours(spec, dtype, "skip")
    return rows


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    bandwidth, numel = report["copy_bandwidth"], report["numel"]
    lines = [
        f"{report['device']}, torch {report['torch']}, Triton {report['triton']}; {numel:,} parameters in "
        f"{report['tensors']} tensors; copy {bandwidth / 1e9:,.0f} GB/s.",
        "",
        "| step | parameters | ms | bytes per parameter | of copy bandwidth | peak above state |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        if "left_out" in row:
            lines.append(f"| {row['name']} | {row['dtype']} | left out: {row['left_out']} | | | |")
            continue
        nbytes = row["bytes_per_parameter"]
        share = f"{nbytes * numel / (row['ms'] / 1e3) / bandwidth:.0%}" if nbytes else ""
        lines.append(f"| {row['name']} | {row['dtype']} | {row['ms']:.2f} | {f'{nbytes:.1f}' if nbytes else ''} | "
                     f"{share} | {row['peak_above_state'] / 2**20:,.1f} MiB |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=1_236_000_000, help="parameters, about (default those of 1B)")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each candidate, fewer where they are slow")
    parser.add_argument("--seconds", type=float, default=1.5, help="of timing for each candidate")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which what is left is left out")
    parser.add_argument("--brief", action="store_true", help="only the main specs and the other libraries")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where step_gpu.json and step_gpu.md are written")
    args = parser.parse_args()
    deadline = time.monotonic() + args.minutes * 60
    if not torch.cuda.is_available():
        print("step_gpu.py needs a CUDA device, and torch sees none here.", file=sys.stderr)
        return 1
    from memopt.kernels import triton

    reason = triton.missing("cuda")
    if reason:
        print(f"step_gpu.py needs the Triton kernels: {reason}.", file=sys.stderr)
        return 1
    wrong = {}
    for dtype in DTYPES.values():
        for spec in specs(args.brief):
            if time.monotonic() < deadline - 0.6 * args.minutes * 60 or spec in MAIN:
                wrong[spec, str(dtype)] = check(spec, dtype)
    failures = {f"{spec} on {dtype}": text for (spec, dtype), text in wrong.items() if text}
    print(f"{len(wrong) - len(failures)} of {len(wrong)} specs agree with the plain path", file=sys.stderr)
    for name, text in failures.items():
        print(f"WRONG {name}: {text}", file=sys.stderr)
    # Parameter, gradient and fp32 state of three moments in fp32, with a tenth to spare.
    room = torch.cuda.mem_get_info()[0] * 0.9 / 20
    shapes = llama(int(min(args.numel, room)))
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.version(),
        "numel": sum(torch.Size(s).numel() for s in shapes), "tensors": len(shapes),
        "copy_bandwidth": copy_bandwidth(1 << 28), "checked": len(wrong), "failures": failures,
    }  # fmt: skip
    report["rows"] = compare(args, shapes, deadline)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "step_gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "step_gpu.md").write_text(table(report))
    print(table(report))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
