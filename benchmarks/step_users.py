"""The time of a step as people get it, on a CPU: a fresh process, nothing settled first, the default policy, with
clipping and without; settled figures beside it.

    python benchmarks/step_users.py [--numel 16777216] [--threads 2] [--processes 5] [--only SPEC]

Writes benchmarks/results/step_users.json and .md. Each spec has processes of its own, in which its steps and those of
torch's fused AdamW are taken in turn; a process gives the ratio of two medians, the table the median of the processes
with the smallest and the largest. Clipping is torch's ``clip_grad_norm_`` before torch's step, and ``max_grad_norm``
here; where it is active, torch's bound is each time a little below the norm, since it changes the gradients.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from provenance import write_result

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
}
#: What is measured: name here -> the name of torch's that it is compared with.
AGAINST = {
    "step": "torch step",
    "propagate": "torch step",
    "clipped": "torch clipped",
    "clip inactive": "torch clip inactive",
    "clip_grad_norm_ and step": "torch clipped",
    "settled step": "torch step",
    "settled clipped": "torch clipped",
}
ROUNDS, SETTLED_ROUNDS = 12, 6


def worker(spec: str, numel: int, threads: int) -> dict[str, float]:
    """Medians in ms of every kind of step, in this process."""
    import torch
    from settled import settle

    import memopt

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rows = 1 << (numel.bit_length() // 2)

    def parameter() -> list[torch.nn.Parameter]:
        p = torch.nn.Parameter(torch.randn(rows, numel // rows))
        p.grad = torch.randn_like(p)
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

    made = []

    def ours(**keywords: Any) -> Callable[[], Any]:
        opt = memopt.create(parameter(), spec, **keywords)
        made.append(opt)
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
        "step": ours(),
        "propagate": ours(nonfinite="propagate"),
        "clipped": ours(max_grad_norm=0.5 * norm),
        "clip inactive": ours(max_grad_norm=1e30),
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
    for opt in made:
        settle(opt)
    settled = timed(SETTLED_ROUNDS, ["torch step", "torch clipped", "step", "clipped"])
    # Compared with torch's steps beside them, scaled to the ones that the table is of.
    for name in ("step", "clipped"):
        found[f"settled {name}"] = settled[name] * found[f"torch {name}"] / settled[f"torch {name}"]
    return found


def measure(spec: str, args: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", spec, "--numel", str(args.numel), "--threads", str(args.threads)]
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(args.processes)
    ]
    row: dict[str, Any] = {"spec": spec, "ms": {name: median(run[name] for run in runs) for name in runs[0]}}
    for name, other in AGAINST.items():
        ratios = sorted(run[name] / run[other] for run in runs)
        row[name] = {"ratio": median(ratios), "least": ratios[0], "most": ratios[-1]}
    return row


def table(rows: list[dict[str, Any]], args: Any) -> str:
    kinds = list(AGAINST)
    lines = [
        "# Steps as people get them",
        "",
        f"{args.numel:,} parameters, {args.threads} threads, fresh processes ({args.processes} of each spec). Ratios "
        "to torch's fused AdamW; with clipping to torch's `clip_grad_norm_` and that step: the median of the "
        "processes, the smallest and the largest. In brackets the bar.",
        "",
        "| spec | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    for row in rows:
        clipped, plain = BARS[row["spec"]]
        bars = {"clipped": clipped, "clip inactive": clipped, "step": plain}
        cells = []
        for kind in kinds:
            one, bar = row[kind], bars.get(kind)
            cells.append(
                f"{one['ratio']:.2f} ({one['least']:.2f} to {one['most']:.2f})"
                + (f" [{bar}]" if bar is not None else "")
            )
        lines.append(f"| {row['spec']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--numel", type=int, default=1 << 24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--only", default="", help="one spec, printed and not written")
    parser.add_argument("--worker", help="used by itself")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.worker, args.numel, args.threads)))
        return
    rows = []
    for spec in BARS:
        if args.only in ("", spec):
            rows.append(measure(spec, args))
            print(table(rows[-1:], args).splitlines()[-1], flush=True)
    if not args.only:
        write_result(
            RESULTS / "step_users.json", {"numel": args.numel, "threads": args.threads, "rows": rows, "bars": BARS}
        )
        (RESULTS / "step_users.md").write_text(table(rows, args))


if __name__ == "__main__":
    main()
