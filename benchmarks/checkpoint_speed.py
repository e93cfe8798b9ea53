"""Time and memory of saving and loading, against torch.save and torch.load of the same bytes.

    python benchmarks/checkpoint_speed.py --folder DISK --out benchmarks/results/checkpoint_speed.json

Turns are interleaved and the best and the median of each are reported. The ratio is to torch.save with what a
checkpoint needs that is to survive the machine, as memopt.save does it: a new file, an fsync, and only then the old one
removed. Beside it stand torch.save to a new file without that, and over the old file, which an interruption destroys.
memopt.save also takes checksums and memopt.load verifies them before it reads. Extra memory is the peak of the
resident set over what it was, sampled every 2 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from provenance import write_result

import memopt

WIDTH = 2048


def synced(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    os.fsync(handle)
    os.close(handle)


def peak_extra(work: Callable[[], Any]) -> int:
    """Bytes by which the resident set rose while ``work`` ran."""
    process, going = psutil.Process(), True
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while going:
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    going = False
    watcher.join()
    return peak - before


def measure(spec: str, layers: int, turns: int, folder: Path) -> dict[str, Any]:
    model = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))
    opt = memopt.create(model, spec)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    opt.step()
    file, fresh, ours = folder / "theirs.pt", folder / "fresh.pt", folder / "ours"

    def torch_over() -> None:
        torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, file)

    def torch_new() -> None:
        torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, fresh)
        os.replace(fresh, file)

    def torch_durable() -> None:
        torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, fresh)
        synced(fresh)
        os.replace(fresh, file)

    def torch_load() -> None:
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])

    works: dict[str, Callable[[], Any]] = {
        "torch.save over the old file": torch_over,
        "torch.save to a new file": torch_new,
        "torch.save, durable": torch_durable,
        "memopt.save": lambda: memopt.save(ours, model=model, optimizer=opt, keep=1),
        "torch.load": torch_load,
        "memopt.load": lambda: memopt.load(ours, model=model, optimizer=opt),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            os.sync()  # nobody pays for what another left to write
            begin = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    nbytes = sum(f.stat().st_size for f in next(ours.iterdir()).iterdir())
    best = {name: min(times) for name, times in seconds.items()}
    middle = {name: median(times) for name, times in seconds.items()}
    return {
        "spec": spec,
        "nbytes": nbytes,
        "best_s": {k: round(v, 4) for k, v in best.items()},
        "median_s": {k: round(v, 4) for k, v in middle.items()},
        "save_ratio": {
            "best": ratio(best, "memopt.save", "torch.save, durable"),
            "median": ratio(middle, "memopt.save", "torch.save, durable"),
            "pairs": pairs(seconds, "memopt.save", "torch.save, durable"),
        },
        "load_ratio": {
            "best": ratio(best, "memopt.load", "torch.load"),
            "median": ratio(middle, "memopt.load", "torch.load"),
            "pairs": pairs(seconds, "memopt.load", "torch.load"),
        },
        "peak_extra_nbytes": {name: peak_extra(works[name]) for name in ("memopt.save", "memopt.load")},
    }


def ratio(times: dict[str, float], ours: str, theirs: str) -> float:
    return round(times[ours] / times[theirs], 3)


def pairs(seconds: dict[str, list[float]], ours: str, theirs: str) -> float:
    """The median of the ratios within each turn."""
    return round(median(a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True)), 3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where to write; by default the folder for temporary files")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for spec in ("adamw", "adamw-8bit"):
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            results.append(measure(spec, args.layers, args.turns, folder))
        finally:
            shutil.rmtree(folder)
        print(json.dumps(results[-1], indent=1), flush=True)
    if args.out:
        write_result(args.out, {"torch": torch.__version__, "threads": 1, "runs": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
