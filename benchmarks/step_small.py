"""The time of a step of many small tensors on a CPU, of which another quarter has no gradient in each step, and with
state on a disk.

    python benchmarks/step_small.py [--count 500] [--numel 1000] [--threads 2] [--processes 5]

Writes benchmarks/results/step_small.json and .md, in a minute. ``quarter``: in each round another quarter of the
tensors, drawn anew, has ``grad = None``, the same for all that are compared; the ratio is that of the medians to
torch's fused AdamW on the same. ``all`` is with all gradients. ``@disk`` is compared with the time that its own disk
takes for the same bytes: whole pages of its file read and written again past the page cache, in requests of 16 MiB.
With ``directory=`` a step is done when it cannot be lost any more, and so is its disk: it is waited for once
(``fdatasync``). The step waits a second time, for the record that says which bytes are the state.
"""

from __future__ import annotations

import mmap
import random
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from statistics import median
from typing import Any

import small_tensors

SPECS = ("adamw", "adamw-8bit", "adamw-4bit", "lion-8bit", "adafactor", "came", "lamb", "adamw@cpu", "adamw@host")
ON_DISK = ("adamw@disk", "adamw-8bit@disk")
#: Committed after every step.
COMMITTED = ("adamw@disk, directory=",)
#: The largest ratio that each is to have.
BAR_QUARTER, BAR_DISK = 1.2, 3.0
ROUNDS, REQUEST = 30, 16 << 20


def worker(count: int, numel: int, threads: int) -> dict[str, Any]:
    """Medians in ms of every kind of step, in this process."""
    import torch

    import memopt

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    gradients = [torch.randn(numel) for _ in range(count)]

    def parameters() -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.randn(numel)) for _ in range(count)]

    made: dict[str, tuple[list[torch.nn.Parameter], Any]] = {}
    params = parameters()
    made["torch"] = params, torch.optim.AdamW(params, fused=True)
    directory = tempfile.TemporaryDirectory(prefix="memopt-")
    for name in (*SPECS, *ON_DISK, *COMMITTED):
        params = parameters()
        spec, _, kept = name.partition(", ")
        made[name] = params, memopt.create(params, spec, **({"directory": directory.name} if kept else {}))

    def timed(missing: Callable[[], set[int]]) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in made}
        for i in range(-2, ROUNDS):
            without = missing() if i >= 0 else set()  # the first two are not counted
            for name, (params, opt) in made.items():
                for k, (p, g) in enumerate(zip(params, gradients, strict=True)):
                    p.grad = None if k in without else g
                start = time.perf_counter()
                opt.step()
                if i >= 0:
                    times[name].append(time.perf_counter() - start)
        return {name: median(some) * 1e3 for name, some in times.items()}

    found: dict[str, Any] = {"all": timed(set), "quarter": timed(lambda: set(random.sample(range(count), count // 4)))}
    found["disk"] = {spec: disk(made[spec][1]) * 1e3 for spec in (*ON_DISK, *COMMITTED)}
    for _, opt in made.values():
        if isinstance(opt, memopt.Optimizer):
            opt.close()
    directory.cleanup()
    return found


def disk(opt: Any) -> float:
    """Seconds for reading the pages of the state from its file and writing them again, and where steps are committed
    until they are on the disk."""
    (store,) = opt.setup.placement_stores
    entries = list(store.entries.values())
    nbytes = sum(entry.nbytes for entry in entries)
    first = min(entry.begins[0] for entry in entries)
    buffer = memoryview(mmap.mmap(-1, nbytes))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for act in (store.arena.read, store.arena.write):
            for at in range(0, nbytes, REQUEST):
                act(buffer[at : at + REQUEST], first + at)
        if store.directory:
            store.arena.sync()
        times.append(time.perf_counter() - start)
    return median(times)


def rows_of(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for spec in (*SPECS, *ON_DISK, *COMMITTED):
        row: dict[str, Any] = {"spec": spec}
        for kind in ("all", "quarter"):
            row[kind] = spread([run[kind][spec] / run[kind]["torch"] for run in runs])
            row[f"{kind} ms"] = median(run[kind][spec] for run in runs)
        if spec in (*ON_DISK, *COMMITTED):
            row["disk"] = spread([run["all"][spec] / run["disk"][spec] for run in runs])
            row["disk ms"] = median(run["disk"][spec] for run in runs)
        rows.append(row)
    return rows


def spread(ratios: list[float]) -> dict[str, float]:
    return {"ratio": median(ratios), "least": min(ratios), "most": max(ratios)}


def table(rows: list[dict[str, Any]], args: Namespace) -> str:
    def cell(row: dict[str, Any], kind: str) -> str:
        one = row.get(kind)
        return f"{one['ratio']:.2f} ({one['least']:.2f}–{one['most']:.2f})" if one else ""

    lines = [
        "# Steps of many small tensors",
        "",
        f"`python benchmarks/step_small.py`: {args.count} tensors of {args.numel} elements, {args.threads} threads, "
        f"{args.processes} fresh processes: the median, the smallest and the largest. Ratios to torch's fused AdamW on "
        f"the same, with all gradients and with another quarter of them missing in each step [{BAR_QUARTER}]; of "
        f"`@disk` to the time of its own disk for the same bytes, with `directory=` until they are on it (one "
        f"`fdatasync`; a step has two, the second for the record that is replaced) [{BAR_DISK}].",
        "",
        "| spec | ms | all | a quarter missing | to its disk |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        found = " | ".join(cell(row, kind) for kind in ("all", "quarter", "disk"))
        lines.append(f"| {row['spec']} | {row['all ms']:.2f} | {found} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    bars = {"quarter": BAR_QUARTER, "disk": BAR_DISK}
    small_tensors.main(__file__, __doc__, 5, worker, rows_of, table, bars=bars)
