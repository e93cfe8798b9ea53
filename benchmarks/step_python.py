"""What a step costs in Python: this tree beside an older one, in pairs.

    git worktree add /tmp/before e0d2209               the commit before the boundary
    python benchmarks/step_python.py /tmp/before          writes benchmarks/results/step_python.json and .md

Each tree is a process of its own. They take turns, a few steps each, and CPU time of the stepping thread is taken
(``time.thread_time``), so that other load on the machine weighs little; the ratio is the median over the pairs, with
the quarters beside it. Scenarios: 500 small tensors and one of 16.8 million elements with a plan; 500 without one,
under ``/zero1`` on two ranks, and for ``@cpu`` and ``@host`` beside a device that is simulated in host memory.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from provenance import write_result

HERE = Path(__file__).parent
RESULTS = HERE / "results"
#: name -> (spec, tensors, elements of each, steps of a turn, what is special)
SCENARIOS: dict[str, tuple[str, int, int, int, str]] = {
    "planned, 500 small tensors": ("adamw", 500, 64, 20, ""),
    "planned, 500 small tensors, 8 bits": ("adamw-8bit", 500, 64 * 64, 10, ""),
    "planned, 16.8 million elements": ("adamw", 1, 4096 * 4096, 2, ""),
    "without a plan, 500 small tensors": ("adamw", 500, 64, 5, "anew"),
    "/zero1 on two ranks, 500 small tensors": ("adamw/zero1", 500, 64 * 64, 3, "ranks"),
    "@cpu of a device, 500 small tensors": ("adamw@cpu", 500, 64 * 64, 2, "device"),
    "@host of a device, 500 small tensors": ("adamw@host", 500, 64 * 64, 2, "device"),
}


def worker(name: str) -> None:
    """Answers each line of its input with the seconds of a turn."""
    import time

    import torch

    import memopt

    spec, count, numel, steps, special = SCENARIOS[name]
    torch.set_num_threads(1)
    if special == "device":
        _simulate_device()
    torch.manual_seed(0)
    shape = (64, numel // 64) if numel > 64 else (numel,)
    params = [torch.nn.Parameter(torch.randn(shape)) for _ in range(count)]
    options = {"offload_gradients": False} if "@cpu" in spec else {}
    opt = memopt.create(params, spec, **options)
    for p in params:
        p.grad = torch.randn_like(p)

    def turn() -> float:
        begin = time.thread_time()
        for _ in range(steps):
            if special == "anew":
                opt.param_groups = [dict(group) for group in opt.param_groups]
            opt.step()
        return (time.thread_time() - begin) / steps

    turn()
    if int(os.environ.get("RANK", "0")) > 0:
        while True:  # as often as rank 0 is asked
            flag = torch.zeros(1)
            torch.distributed.broadcast(flag, 0)
            if not flag:
                return
            turn()
    print("ready", flush=True)
    for line in sys.stdin:
        if "RANK" in os.environ:
            torch.distributed.broadcast(torch.tensor([float(line.strip() == "go")]), 0)
        if line.strip() != "go":
            return
        print(turn(), flush=True)


def _simulate_device() -> None:
    """Memory of the CPU counts as a device's, in this tree or in one of before its folders were named."""
    for where, what in (
        ("memopt.placements.transfer.device", "tests.helpers.simulated"),
        ("memopt.placements.bus", "simulated"),
    ):
        try:
            found, made = import_module(where), import_module(what).ThreadedBus()
        except ModuleNotFoundError:
            continue
        transfers = found.TRANSFERS if hasattr(found, "TRANSFERS") else found.BUSES
        transfers["cpu"] = lambda where, made=made: made
        return
    raise ModuleNotFoundError("this tree has no simulated device")


class Tree:
    """One tree's processes for one scenario of ``script``."""

    def __init__(self, root: Path, name: str, store: Path, world: int = 1, script: str = __file__) -> None:
        env = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}
        self._all = []
        for rank in range(world):
            mine = {**env, "RANK": str(rank), "WORLD_SIZE": "2", "STORE": str(store)} if world > 1 else env
            command = [sys.executable, script, "--worker", name]
            self._all.append(
                subprocess.Popen(command, env=mine, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
        self._first = self._all[0]
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self._first.stdout is not None
        return self._first.stdout.readline().strip()

    def _say(self, word: str) -> None:
        assert self._first.stdin is not None
        self._first.stdin.write(f"{word}\n")
        self._first.stdin.flush()

    def turn(self) -> float:
        self._say("go")
        return float(self._answer())

    def close(self) -> None:
        self._say("end")
        for process in self._all:
            process.wait(60)


def compare(before: Path, name: str, pairs: int, scratch: Path, world: int, script: str = __file__) -> dict[str, Any]:
    """Turns of both trees in pairs, each first in turn."""
    roots = {"before": before, "here": HERE.parent}
    trees = [Tree(root, name, scratch / which, world, script) for which, root in roots.items()]
    taken: tuple[list[float], list[float]] = ([], [])
    for i in range(pairs):
        for j in (0, 1) if i % 2 == 0 else (1, 0):
            taken[j].append(trees[j].turn())
    for tree in trees:
        tree.close()
    ratios = [b / a for a, b in zip(*taken, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return {
        "before_ms": median(taken[0]) * 1e3,
        "here_ms": median(taken[1]) * 1e3,
        "ratio": median(ratios),
        "quarters": [low, high],
        "pairs": pairs,
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", nargs="?", type=Path, help="a checkout of the commit to compare with")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--only", default="", help="scenarios with this in their name")
    parser.add_argument("--worker", help="used by itself")
    args = parser.parse_args()
    if args.worker:
        if "RANK" in os.environ:
            import torch.distributed as dist

            store = dist.FileStore(os.environ["STORE"], 2)
            dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=2)
        worker(args.worker)
        sys.stdout.flush()
        os._exit(0)
    from tempfile import TemporaryDirectory

    import torch

    found = {}
    for name in SCENARIOS:
        if args.only in name:
            with TemporaryDirectory() as scratch:
                world = 2 if SCENARIOS[name][4] == "ranks" else 1
                found[name] = compare(args.before.resolve(), name, args.pairs, Path(scratch), world)
            print(name, found[name], flush=True)
    if args.only:
        return
    facts = {
        "commit": _commit(HERE.parent),
        "before": _commit(args.before),
        "command": " ".join(sys.argv),
        "processor": _processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    write_result(RESULTS / "step_python.json", {**facts, "scenarios": found})
    rows = [
        f"| {name} | {one['before_ms']:.2f} | {one['here_ms']:.2f} | {one['ratio']:.2f} | "
        f"{one['quarters'][0]:.2f} to {one['quarters'][1]:.2f} |"
        for name, one in found.items()
    ]
    head = (
        f"# CPU time of a step's thread: {facts['commit']} beside {facts['before']}\n\n"
        f"{facts['processor']}, torch {facts['torch']}, Python {facts['python']}, one thread. The ratio is the median "
        "over pairs, with the quarters.\n\n"
        "| step | before, ms | here, ms | ratio | quarters |\n|---|---|---|---|---|\n"
    )
    (RESULTS / "step_python.md").write_text(head + "\n".join(rows) + "\n")


def _commit(root: Path) -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True
    ).stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
