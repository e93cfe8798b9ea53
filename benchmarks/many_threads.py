"""How a CPU step is shared out among 2, 16 and 64 threads, by simulation.

    python benchmarks/many_threads.py [--print]

The kernels are compiled with :file:`simulated_pool.cpp` in the place of their pool: every task of a step is run and
timed, and given to the thread that would be free first. ``serial`` is the part of a step on one thread that is in no
task, and cannot be shared; ``speed-up`` is a step on one thread over the longest thread's tasks and the serial part.
Caches and memory are those of one thread: how far memory carries is not simulated. All lies on large pages already:
putting it there is no task, and a sixtieth of a step until it is done (memopt/kernels/huge_pages.py). Writes
results/many_threads.json and .md.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from provenance import write_result
from settled import settle

import memopt
from memopt.kernels import loader
from memopt.kernels.build import COMMON, FLAGS, SOURCES, compiler

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SPECS = ("adamw", "adamw-8bit", "adamw-4bit", "adafactor", "came", "stableadamw", "lamb", "adamw-8bit.factored")
THREADS = (2, 16, 64)
#: One matrix; the matrices and vectors of a small model, most of which one thread takes alone.
MODELS: dict[str, list[tuple[int, ...]]] = {
    "one matrix": [(4096, 4096)],
    "a model": [(8192, 512), *[(512, 512), (512, 512), (2048, 512), (512, 2048), (1024, 1024), (512,), (512,)] * 4],
}
#: A serial part is not to be larger.
BAR = 0.02
ROUNDS = 5


@contextmanager
def simulated() -> Iterator[ctypes.CDLL]:
    """All steps of this process run on these kernels."""
    with tempfile.TemporaryDirectory() as directory:
        native = ["-march=native", "-mprefer-vector-width=512", "-Wno-psabi"]
        flags = [*compiler(), *FLAGS, f"-I{SOURCES}", *native, "-c"]
        jobs = {"isa": [f"{SOURCES}/isa.cpp", "-DMEMOPT_TABLE=memopt_baseline"], "pool": [f"{HERE}/simulated_pool.cpp"]}
        jobs |= {Path(name).name: [f"{SOURCES}/{name}.cpp"] for name in COMMON if name != "pool"}
        for name, rest in jobs.items():
            subprocess.run([*flags, *rest, "-o", f"{directory}/{name}.o"], check=True)
        target = f"{directory}/simulated.so"
        objects = [f"{directory}/{name}.o" for name in jobs]
        subprocess.run([*compiler(), "-shared", *objects, "-o", target, "-lpthread", "-ldl"], check=True)
        loader.INSTALLED = Path(target)  # taken for what was built at installation
        found = loader.library()
        assert found is not None
        assert found.path == loader.INSTALLED
        yield found.handle


def measure(spec: str, shapes: list[tuple[int, ...]], threads: int, handle: ctypes.CDLL) -> dict[str, float]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    opt = memopt.create(params, spec)
    settle(opt)
    before = torch.get_num_threads()
    found: list[tuple[float, float]] = []
    try:
        torch.set_num_threads(threads)
        for _ in range(ROUNDS):
            handle.memopt_simulation_begin()
            opt.step()
            numbers = (ctypes.c_double * 3)()
            handle.memopt_simulation_end(numbers)
            alone, together, work = numbers
            found.append((alone / (alone + work), (alone + work) / (alone + together)))
    finally:
        torch.set_num_threads(before)
    return {"serial": median(one for one, _ in found), "speed-up": median(one for _, one in found)}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# A step on many threads",
        "",
        f"`python benchmarks/many_threads.py`, a simulation of the partition of the work: the part of a step that is "
        f"in no task (Python's too) [{BAR:.0%}], and how much faster 2, 16 and 64 threads are than one.",
        "",
        "| tensors | spec | serial | " + " | ".join(f"{n} threads" for n in THREADS) + " |",
        "|---" * (3 + len(THREADS)) + "|",
    ]
    for row in rows:
        ups = " | ".join(f"{row[str(n)]['speed-up']:.1f}" for n in THREADS)
        lines.append(f"| {row['model']} | {row['spec']} | {row[str(THREADS[-1])]['serial']:.2%} | {ups} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    with simulated() as handle:
        for model, shapes in MODELS.items():
            for spec in SPECS:
                row = {str(n): measure(spec, shapes, n, handle) for n in THREADS}
                rows.append({"model": model, "spec": spec, **row})
    if "--print" not in sys.argv:
        write_result(RESULTS / "many_threads.json", {"rows": rows, "bar": BAR})
        (RESULTS / "many_threads.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
