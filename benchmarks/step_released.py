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

import random
import time
from argparse import Namespace
from collections.abc import Callable
from statistics import median
from typing import Any

import small_tensors

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


def rows_of(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
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


if __name__ == "__main__":
    small_tensors.main(__file__, __doc__, 3, worker, rows_of, table)
