"""The time of steps inside ``backward()`` on a CPU, of many small tensors, of which another quarter has no gradient in
each iteration.

    python benchmarks/step_released.py [--count 500] [--numel 1000] [--threads 2] [--processes 3] [--print]

Writes benchmarks/results/step_released.json and .md, in three minutes. An iteration is ``backward()`` and what
follows it until no gradient is left; what ``backward()`` takes by itself is subtracted. Compared are
``opt.release_gradients`` and torch's recipe for the same, a fused AdamW for each parameter that steps in its hook;
both beside ``opt.step()`` behind ``backward()``. ``quarter / all`` is what a changing set costs: without anything
planned anew it is the 0.75 that step.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from provenance import write_result

RESULTS = Path(__file__).parent / "results"
SPECS = ("adamw", "adamw-8bit", "adamw@cpu", "adamw@host", "adamw@disk")
ROUNDS = 20


def worker(count: int, numel: int, threads: int) -> dict[str, dict[str, float]]:
    """Medians in ms of the part of each kind of iteration that is not ``backward()``, in this process."""
    import torch
    from torch import Tensor, nn

    import memopt

    torch.set_num_threads(threads)
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([nn.Parameter(torch.randn(numel)) for _ in range(count)])

        def forward(self, without: set[int]) -> Tensor:
            return torch.stack([w.dot(w.detach()) for i, w in enumerate(self.weights) if i not in without]).sum()

    Kind = tuple[Model, Callable[[], Any]]

    def hooks() -> Kind:
        model = Model()
        optimizers = {w: torch.optim.AdamW([w], fused=True) for w in model.weights}

        def step(w: Tensor) -> None:
            optimizers[w].step()
            optimizers[w].zero_grad()

        for w in model.weights:
            w.register_post_accumulate_grad_hook(step)
        return model, lambda: None

    def behind(optimizer: torch.optim.Optimizer, model: Model) -> Kind:
        def end() -> None:
            optimizer.step()
            optimizer.zero_grad()

        return model, end

    def ours(spec: str, released: bool) -> Kind:
        model = Model()
        optimizer = memopt.create(model, spec)
        if released:
            optimizer.release_gradients(model)
        return behind(optimizer, model)

    plain, bare = Model(), Model()
    kinds = {
        "backward": (bare, lambda: bare.zero_grad()),
        "torch, behind": behind(torch.optim.AdamW(plain.parameters(), fused=True), plain),
        "torch, in hooks": hooks(),
        "adamw, behind": ours("adamw", False),
        **{spec: ours(spec, True) for spec in SPECS},
    }
    found: dict[str, dict[str, float]] = {}
    for what, missing in (("all", 0), ("quarter", count // 4)):
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for i in range(-2, ROUNDS):  # the first two are not counted
            without = set(random.sample(range(count), missing))
            for name, (model, end) in kinds.items():
                loss = model(without)
                start = time.perf_counter()
                loss.backward()
                end()
                if i >= 0:
                    times[name].append(time.perf_counter() - start)
        medians = {name: median(some) * 1e3 for name, some in times.items()}
        found[what] = {name: ms - medians["backward"] for name, ms in medians.items() if name != "backward"}
    return found


def measure(args: Namespace) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--worker", "--count", str(args.count), "--numel", str(args.numel)]
    runs = []
    for _ in range(args.processes):
        done = subprocess.run([*command, "--threads", str(args.threads)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        runs.append(json.loads(done.stdout))
    rows = []
    for name in runs[0]["all"]:
        row: dict[str, Any] = {"name": name}
        for what in ("all", "quarter"):
            row[f"{what} ms"] = median(run[what][name] for run in runs)
            row[what] = median(run[what][name] / run[what]["torch, in hooks"] for run in runs)
        row["quarter / all"] = median(run["quarter"][name] / run["all"][name] for run in runs)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], args: Namespace) -> str:
    lines = [
        "# Steps inside backward()",
        "",
        f"`python benchmarks/step_released.py`: {args.count} tensors of {args.numel} elements, {args.threads} threads, "
        f"medians of {args.processes} processes, without what `backward()` takes by itself. `behind` steps when it is "
        "through; the specs are under `opt.release_gradients`. Ratios to torch's recipe, a fused AdamW for each "
        "parameter that steps in its hook.",
        "",
        "| | ms | ratio | a quarter missing, ms | ratio | quarter / all |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['all ms']:.1f} | {row['all']:.2f} | {row['quarter ms']:.1f} | "
            f"{row['quarter']:.2f} | {row['quarter / all']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--numel", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--print", action="store_true", help="print the table and write nothing")
    parser.add_argument("--worker", action="store_true", help="used by itself")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.count, args.numel, args.threads)))
        return
    rows = measure(args)
    if not args.print:
        write_result(RESULTS / "step_released.json", {"count": args.count, "numel": args.numel, "rows": rows})
        (RESULTS / "step_released.md").write_text(table(rows, args))
    print(table(rows, args))


if __name__ == "__main__":
    main()
