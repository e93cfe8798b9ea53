"""State that lives elsewhere: training with 4 GiB of it under a cap of 1.5 GiB, and the step on the host's processor.

    python benchmarks/offload.py            # some minutes, 20 GiB of disk in TMPDIR
    python benchmarks/offload.py --quick    # 1 GiB of state under 0.75 GiB

Each placement trains in a process of its own, under a memory cgroup where this user may make one (its kernel kills what
goes over), and a watcher kills it when its resident memory (psutil) goes over the cap. Parameters are bfloat16 and
step inside backward(), each when its gradient is there. After every step, while the child waits, this process reads and
writes 1 GiB straight from and to the same disk with as many threads and does nothing else: scaled to the state, that is
the time that the disk allows.

The second table steps the same fp32 parameters by DeepSpeedCPUAdam and by ``adamw-8bit@cpu`` in turns, in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from offload_capped import GIB, capped
from provenance import write_result

RESULTS = Path(__file__).parent / "results"


def train(spec: str, layers: int, steps: int, options: dict[str, Any]) -> None:
    """The child: prints one JSON line for each step."""
    import psutil
    import torch

    import memopt

    torch.manual_seed(0)
    width = 4096

    class Block(torch.nn.Module):
        """x + tanh(W x) / 8: what matters here is that parameters are many and activations few."""

        def __init__(self) -> None:
            super().__init__()
            weight = torch.empty(width, width, dtype=torch.bfloat16)
            for row in weight.split(256):
                row.normal_(std=width**-0.5)
            self.weight = torch.nn.Parameter(weight)

        def forward(self, x: Any) -> Any:
            return x + torch.tanh(x @ self.weight.T) / 8

    model = torch.nn.Sequential(*(Block() for _ in range(layers)))
    opt = memopt.create(model, spec, lr=1e-3, **options)
    opt.release_gradients(model)
    took = 0.0
    inner = opt.stepper.step_some

    def timed(*args: Any) -> Any:
        nonlocal took
        begin = time.perf_counter()
        result = inner(*args)
        took += time.perf_counter() - begin
        return result

    opt.stepper.step_some = timed  # type: ignore[method-assign]
    x, y = (torch.randn(8, width).bfloat16() for _ in "xy")
    for step in range(steps):
        took = 0.0
        loss = (model(x) - y).float().square().mean()
        loss.backward()
        begin = time.perf_counter()
        opt.step()
        took += time.perf_counter() - begin
        opt.zero_grad()
        nbytes = opt.ledger().by("lifetime")["persistent"]
        line = {
            "step": step,
            "loss": loss.item(),
            "step_s": took,
            "state_bytes": nbytes,
            "resident_bytes": psutil.Process().memory_info().rss,
        }
        print(json.dumps(line), flush=True)
        sys.stdin.readline()  # until the disk has been measured
    here = tempfile.gettempdir()
    placed = [row.replace(here, "TMPDIR") for row in opt.explain().splitlines() if row.startswith("placement")]
    print(json.dumps({"explain": placed}), flush=True)


def summary(name: str, run: dict[str, Any], cap: int) -> dict[str, Any]:
    lines = [line for line in run["lines"] if "step" in line]
    later = lines[1:] or lines  # the first step finds state that is not on the disk yet
    ratio = statistics.median(line["disk_s"] / line["step_s"] for line in later) if lines else 0.0
    return {
        "name": name,
        "completed": run["exit_code"] == 0,
        "cap_bytes": cap,
        "steps": len(lines),
        "state_bytes": lines[-1]["state_bytes"] if lines else 0,
        "peak_resident_bytes": run["peak_resident_bytes"],
        "cgroup": run["cgroup"] == "True",
        "cgroup_peak_bytes": run["cgroup_peak_bytes"],
        "step_s": statistics.median(line["step_s"] for line in later) if lines else 0.0,
        "disk_s": statistics.median(line["disk_s"] for line in later) if lines else 0.0,
        "share_of_what_the_disk_allows": ratio,
        "losses": [line["loss"] for line in lines],
        "run": run,
    }


def against_deepspeed(numel: int, rounds: int) -> dict[str, Any]:
    """The child for the second table."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from settled import settle

    import memopt

    def parameters() -> list[torch.nn.Parameter]:
        torch.manual_seed(0)
        made = [torch.nn.Parameter(torch.randn(1024, numel // 8192)) for _ in range(8)]
        for p in made:
            p.grad = torch.randn(p.shape)
        return made

    theirs = parameters()
    optimizers: dict[str, torch.optim.Optimizer] = {
        "DeepSpeedCPUAdam": DeepSpeedCPUAdam(theirs, lr=1e-3, weight_decay=0.01, adamw_mode=True),
        "adamw-8bit@cpu": memopt.create(parameters(), "adamw-8bit@cpu", lr=1e-3, nonfinite="propagate"),
        "adamw@cpu": memopt.create(parameters(), "adamw@cpu", lr=1e-3, nonfinite="propagate"),
    }
    for opt in optimizers.values():
        settle(opt)
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for i in range(rounds + 2):
        for name, opt in optimizers.items():
            begin = time.perf_counter()
            opt.step()
            if i >= 2:
                times[name].append(time.perf_counter() - begin)
    held = {
        name: sum(t.numel() * t.element_size() for s in opt.state.values() for t in s.values() if torch.is_tensor(t))
        for name, opt in optimizers.items()
    }
    rows = {
        name: {"median_s": statistics.median(t), "min_s": min(t), "state_bytes": held[name]}
        for name, t in times.items()
    }
    ratios = [a / b for a, b in zip(times["DeepSpeedCPUAdam"], times["adamw-8bit@cpu"], strict=True)]
    return {
        "numel": numel,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "rows": rows,
        "speedup_of_8bit": statistics.median(ratios),
    }


def in_turns(numel: int, processes: int) -> dict[str, Any]:
    """The median of several processes: where the system puts a process's pages changes every step's time."""
    job = {"what": "cpu", "numel": numel, "rounds": 15}
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    runs = [
        json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        for _ in range(processes)
    ]
    runs.sort(key=lambda run: run["speedup_of_8bit"])
    return {**runs[len(runs) // 2], "speedups": [run["speedup_of_8bit"] for run in runs]}


def table(results: dict[str, Any]) -> str:
    rows = ["| placement | state | cap | peak resident | completed | step | disk allows | share |", "|" + "---|" * 8]
    for run in results["capped"]:
        rows.append(
            f"| {run['name']} | {run['state_bytes'] / GIB:.2f} GiB | {run['cap_bytes'] / GIB:.2f} GiB"
            f"{' (cgroup)' if run['cgroup'] else ''} | {run['peak_resident_bytes'] / GIB:.2f} GiB | "
            f"{'yes' if run['completed'] else 'NO'} | {run['step_s']:.2f} s | {run['disk_s']:.2f} s | "
            f"{run['share_of_what_the_disk_allows']:.0%} |"
        )
    text = "# Offload\n\n" + "\n".join(rows) + "\n"
    cpu = results.get("cpu")
    if cpu:
        text += f"\n{cpu['numel']:,} fp32 parameters, {cpu['threads']} threads, {cpu['rounds']} steps, in turns.\n\n"
        text += "| optimizer | step, median | state |\n|---|---|---|\n"
        for name, row in cpu["rows"].items():
            text += f"| {name} | {row['median_s'] * 1e3:.1f} ms | {row['state_bytes'] / 2**20:.1f} MiB |\n"
        found = sorted(cpu["speedups"])
        text += (
            f"\n`adamw-8bit@cpu`: {cpu['speedup_of_8bit']:.2f} times as fast as DeepSpeedCPUAdam, the median of "
            f"{len(found)} processes ({found[0]:.2f} to {found[-1]:.2f}, as their pages lay).\n"
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=["capped", "cpu"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        job = json.loads(args.child)
        if job["what"] == "train":
            train(job["spec"], job["layers"], job["steps"], job["options"])
        else:
            print(json.dumps(against_deepspeed(job["numel"], job["rounds"])))
        return
    layers, cap, steps = (8, int(0.75 * GIB), 3) if args.quick else (32, int(1.5 * GIB), 5)
    path = RESULTS / "offload.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() and args.only else {"capped": []}
    if args.only != "cpu":
        results["capped"] = []
        with tempfile.TemporaryDirectory(prefix="memopt-offload-") as directory:
            for name, spec, options in (
                ("adamw@disk with a directory", "adamw@disk", {"directory": directory, "workspace": "32MiB"}),
                ("adamw@disk", "adamw@disk", {"workspace": "32MiB"}),
                ("adamw@paged", "adamw@paged", {"resident": "32MiB"}),
            ):
                job = {"what": "train", "spec": spec, "layers": layers, "steps": steps, "options": options}
                results["capped"].append(summary(name, capped(__file__, ["--child", json.dumps(job)], cap), cap))
                print(table({"capped": results["capped"][-1:]}), flush=True)
    if args.only != "capped":
        results["cpu"] = in_turns(2**23 if args.quick else 2**26, processes=1 if args.quick else 5)
    RESULTS.mkdir(exist_ok=True)
    write_result(path, results)
    (RESULTS / "offload.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
