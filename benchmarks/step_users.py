"""The time of a step as people get it, on a CPU: a fresh process, nothing settled first, the default policy, with
clipping and without; settled figures and what bounds them beside it.

    python benchmarks/step_users.py [--numel 16777216] [--threads 2] [--processes 5] [--only SPEC]

Writes benchmarks/results/step_users.json and .md, in five minutes of two quiet cores. Each spec has processes of its
own, in which its steps and those of torch's fused AdamW are taken in turn; a process gives the ratio of two medians,
the table the median of the processes with the smallest and the largest. Clipping is torch's ``clip_grad_norm_`` before
torch's step, and ``max_grad_norm`` here; where it is active, torch's bound is each time a little below the norm, since
it changes the gradients. The roofs (:mod:`roof`) are of the default policy without clipping, in the same process and
on the same pages: the loads and stores of the step without arithmetic, each behind a step of torch's as the step is,
its arithmetic on what stays in the cache, and what no step can be under: the larger of the two, with the look at the
gradients, which comes first, as what its loads take. The table goes into docs/kernels.md, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from provenance import write_docs, write_result

RESULTS = Path(__file__).parent / "results"
#: spec -> the largest ratio that it is to have: clipping and step, step, each of torch's.
BARS: dict[str, tuple[float | None, float | None]] = {
    "adamw-8bit": (0.65, 0.85),
    "adamw-4bit": (0.7, None),
    "adamw": (0.85, 1.1),
    "adafactor": (0.9, 1.2),
    "came": (None, 1.5),
    "stableadamw": (None, 1.3),
    "lamb": (None, 1.7),
    "adamw-8bit.factored": (None, None),
    "adamw-4bit.factored": (None, None),
}
#: What is measured: name here -> the name of torch's that it is compared with.
AGAINST = {
    "step": "torch step",
    "propagate": "torch step",
    "clipped": "torch clipped",
    "clip inactive": "torch clip inactive",
    "clip_grad_norm_ and step": "torch clipped",
    "settled step": "torch step",
    "memory roof": "torch step",
    "arithmetic roof": "torch step",
    "bound": "torch step",
}
#: Of these docs/kernels.md has the columns.
SHOWN = ("step", "propagate", "clipped", "clip inactive", "settled step", "memory roof", "arithmetic roof", "bound")
ROUNDS, SETTLED_ROUNDS = 9, 5


def worker(spec: str, numel: int, threads: int, library: str) -> dict[str, float]:
    """Medians in ms of every kind of step, in this process; ``library`` is :func:`roof.build`'s."""
    import roof
    import torch
    from settled import settle

    import memopt

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rows = 1 << (numel.bit_length() // 2)
    first = torch.randn(rows, numel // rows), torch.randn(rows, numel // rows)

    def parameter() -> list[torch.nn.Parameter]:
        p = torch.nn.Parameter(first[0].clone())
        p.grad = first[1].clone()
        return [p]

    def theirs(clip: float | None) -> Callable[[], Any]:
        params = parameter()
        opt = torch.optim.AdamW(params, fused=True)
        bound = [clip]

        def step() -> None:
            if bound[0] is not None:
                torch.nn.utils.clip_grad_norm_(params, bound[0])
                bound[0] *= 0.95
            opt.step()

        return step

    made: dict[str, memopt.Optimizer] = {}

    def ours(name: str, **keywords: Any) -> Callable[[], Any]:
        opt = made[name] = memopt.create(parameter(), spec, **keywords)
        return opt.step

    def ours_apart() -> Callable[[], Any]:
        params = parameter()
        opt = memopt.create(params, spec)
        bound = [0.95 * norm]

        def step() -> None:
            memopt.clip_grad_norm_(params, bound[0])
            bound[0] *= 0.95
            opt.step()

        return step

    norm = float(numel) ** 0.5
    steps = {
        "torch step": theirs(None),
        "torch clipped": theirs(0.95 * norm),
        "torch clip inactive": theirs(1e30),
        "step": ours("step"),
        "propagate": ours("propagate", nonfinite="propagate"),
        "clipped": ours("clipped", max_grad_norm=0.5 * norm),
        "clip inactive": ours("clip inactive", max_grad_norm=1e30),
        "clip_grad_norm_ and step": ours_apart(),
    }

    def timed(rounds: int, names: list[str]) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                start = time.perf_counter()
                steps[name]()
                times[name].append(time.perf_counter() - start)
        return {name: median(some) * 1e3 for name, some in times.items()}

    for step in steps.values():
        step()
    found = timed(ROUNDS, list(steps))
    opt = made["step"]
    p = opt.param_groups[0]["params"][0]
    passes = roof.passes(memopt.parse(spec).rule, p, opt.state[p])
    roofs = [roof.memory([one], numel, library, rounds=3, before=steps["torch step"]) * 1e3 for one in passes]
    found["memory roof"] = sum(roofs)
    found["arithmetic roof"] = roof.arithmetic(spec, numel) * 1e3
    # A look at the gradients alone, of a rule of one pass, comes before the step; other passes are counted together.
    alone = "factored" not in spec and len(passes) == 2 and len(passes[0]) == 1
    look = roofs[0] if alone else 0.0
    arithmetic = roof.arithmetic(spec, numel, nonfinite="propagate") * 1e3 if alone else found["arithmetic roof"]
    found["bound"] = look + max(found["memory roof"] - look, arithmetic)
    settle(opt)
    # Compared with torch's step beside it, scaled to the one that the table is of.
    settled = timed(SETTLED_ROUNDS, ["torch step", "step"])
    found["settled step"] = settled["step"] * found["torch step"] / settled["torch step"]
    return found


def measure(spec: str, args: Namespace, library: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", spec, "--roof", library]
    command += ["--numel", str(args.numel), "--threads", str(args.threads)]
    runs = []
    for _ in range(args.processes):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{spec}: {done.stderr}")
        runs.append(json.loads(done.stdout))
    row: dict[str, Any] = {"spec": spec, "ms": {name: median(run[name] for run in runs) for name in runs[0]}}
    for name, other in AGAINST.items():
        ratios = sorted(run[name] / run[other] for run in runs)
        row[name] = {"ratio": median(ratios), "least": ratios[0], "most": ratios[-1]}
    return row


def cells(row: dict[str, Any], kinds: Iterable[str] = AGAINST) -> str:
    clipped, plain = BARS[row["spec"]]
    bars = {"clipped": clipped, "clip inactive": clipped, "step": plain}
    found = [row["spec"]]
    for kind in kinds:
        one, bar = row[kind], bars.get(kind)
        text = f"{one['ratio']:.2f} ({one['least']:.2f}–{one['most']:.2f})"
        found.append(text + (f" [{bar}]" if bar is not None else ""))
    return "| " + " | ".join(found) + " |"


def table(rows: list[dict[str, Any]], kinds: Iterable[str] = AGAINST) -> list[str]:
    kinds = list(kinds)
    return [
        "| spec | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 1) + "|",
        *(cells(row, kinds) for row in rows),
    ]


def page(rows: list[dict[str, Any]], args: Namespace) -> str:
    torch = [median(row["ms"][name] for row in rows) for name in ("torch step", "torch clipped", "torch clip inactive")]
    lines = [
        "# Steps as people get them",
        "",
        f"`python benchmarks/step_users.py`: {args.numel:,} parameters, {args.threads} threads, fresh processes "
        f"({args.processes} of each spec). Ratios to torch's fused AdamW ({torch[0]:.1f} ms); with clipping to torch's "
        f"`clip_grad_norm_` and that step ({torch[1]:.1f} ms where it clips, {torch[2]:.1f} where the norm is below "
        "the bound): the median of the processes, the smallest and the largest. In brackets the bar. The roofs are "
        "what bounds `step` from below: its loads and stores without arithmetic, and its arithmetic on what stays in "
        "the cache of a core. The bound is the larger of them, and behind a look at the gradients: what that takes and "
        "the larger of the step's.",
        "",
        *table(rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--numel", type=int, default=1 << 24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--only", default="", help="one spec, printed and not written")
    parser.add_argument("--worker", help="used by itself, with --roof")
    parser.add_argument("--roof")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.worker, args.numel, args.threads, args.roof)))
        return
    import roof

    rows, before, start = [], os.getloadavg()[0], time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        library = roof.build(directory)
        for spec in BARS:
            if args.only in ("", spec):
                rows.append(measure(spec, args, library))
                print(cells(rows[-1]), flush=True)
    print(f"{time.perf_counter() - start:.0f} s", flush=True)
    if not args.only:
        result = {"numel": args.numel, "threads": args.threads, "load_before": before, "rows": rows, "bars": BARS}
        write_result(RESULTS / "step_users.json", result)
        (RESULTS / "step_users.md").write_text(page(rows, args))
        write_docs("kernels.md", "step_users.py", "users", table(rows, SHOWN))


if __name__ == "__main__":
    main()
