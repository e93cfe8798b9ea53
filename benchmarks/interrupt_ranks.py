"""Ctrl-C at random bytecodes on two ranks, which then save, as a training loop does that catches KeyboardInterrupt.

    python benchmarks/interrupt_ranks.py --tries 200 --out benchmarks/results/interrupt_ranks.json

Each rank is interrupted at a bytecode of its own of a ``/zero1`` step, a load or a conversion, catches that, and calls
``memopt.save``. Either both save, and what is there is, to the bit, what one process had before the work or after it;
or both get a sentence within the time that the process group allows, and the checkpoint before is still there.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_sweep import require
from interrupt_bytecodes import Interrupt
from interrupt_case import Snapshot, gradients, same, snapshot, step
from provenance import write_result

import memopt
from memopt.checkpoint.opened import Checkpoint

WIDTH, TIMEOUT_S = 72, 4
WORKS = ("step", "load", "convert_")
SENTENCES = (
    "not of the same step",
    "Load a checkpoint",
    "has ended or does not answer",
    "the same call",
    "KeyboardInterrupt",
    "is in the middle of",
)


def made(partition: str, fmt: str = "8bit") -> tuple[torch.nn.Module, memopt.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH))
    return model, memopt.create(model, f"adamw-{fmt}{partition}", lr=1e-2)


def work_of(what: str, folder: Path, model: torch.nn.Module, opt: memopt.Optimizer) -> Callable[[], Any]:
    if what == "step":
        gradients(model, 2)
        return opt.step
    if what == "load":
        return lambda: memopt.load(folder / "later", model=model, optimizer=opt, rng=False)
    return lambda: opt.convert_(str(opt.spec).replace("8bit", "4bit"))


def prepare(what: str, folder: Path) -> dict[str, Snapshot]:
    """Checkpoints of one process before the work, and what that process has before and after it."""
    model, opt = made("")
    for i in range(2):
        step(model, opt, i)
    memopt.save(folder / "before", model=model, optimizer=opt, rng=False)
    later, other = made("")
    for i in range(4):
        step(later, other, i)
    memopt.save(folder / "later", model=later, optimizer=other, rng=False)
    other.close()
    states = {"old": snapshot(model, opt)}
    work_of(what, folder, model, opt)()
    states["new"] = snapshot(model, opt)
    opt.close()
    return states


def rank_of(rank: int, port: int, folder: Path, what: str, at: int) -> None:
    """One rank: its work interrupted, then a save; what became of it is in a file."""
    store = dist.TCPStore("localhost", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT_S))
    model, opt = made("/zero1")
    memopt.load(folder / "before", model=model, optimizer=opt, rng=False)
    try:
        Interrupt(at).run(work_of(what, folder, model, opt))
        memopt.save(folder / "run", model=model, optimizer=opt, rng=False)
        said = "saved"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    (folder / f"said-{rank}").write_text(said)


def both(folder: Path, what: str, ats: list[int]) -> list[str]:
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    children = []
    for rank, at in enumerate(ats):
        (folder / f"said-{rank}").unlink(missing_ok=True)
        child = os.fork()
        if not child:
            try:
                sys.stderr = open(os.devnull, "w")  # noqa: SIM115
                rank_of(rank, server.port, folder, what, at)
            finally:
                os._exit(0)
        children.append(child)
    end = time.monotonic() + 8 * TIMEOUT_S
    for child in children:
        while not os.waitpid(child, os.WNOHANG)[0]:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
    return [(folder / f"said-{rank}").read_text() for rank in range(2)]


def sweep(what: str, tries: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    draw = random.Random(f"{what} {seed}")
    states = prepare(what, folder)
    model, opt = made("")
    memopt.load(folder / "before", model=model, optimizer=opt, rng=False)
    counter = Interrupt(0)
    counter.run(work_of(what, folder, model, opt))
    opt.close()
    outcomes: Counter[str] = Counter()
    for _ in range(tries):
        ats = [draw.randrange(1, counter.count + 1) for _ in range(2)]
        said = both(folder, what, ats)
        where = f"{what}, interrupted at {ats} of about {counter.count}: {said}"
        saved = [one == "saved" for one in said]
        require(saved[0] == saved[1], f"one rank saved, and the other did not: {where}")
        if not saved[0]:
            require(all(any(words in one for words in SENTENCES) for one in said), where)
            require(memopt.load(folder / "before").step == 2, where)
            outcomes["refused"] += 1
            continue
        checkpoint = Checkpoint(folder / "run")
        model, opt = made("", checkpoint.optimizer_of().spec.format)
        checkpoint.close()
        memopt.load(folder / "run", model=model, optimizer=opt, rng=False)
        now = snapshot(model, opt)
        found = [name for name, state in states.items() if same((*now[:2], 0), (*state[:2], 0))]
        require(bool(found), f"what was saved is neither: {where}")
        outcomes[found[0]] += 1
        opt.close()
    return {"bytecodes": counter.count, "outcomes": dict(outcomes)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=200, help="of each work")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    for what in WORKS:
        with tempfile.TemporaryDirectory() as name:
            try:
                rows[what] = sweep(what, arguments.tries, Path(name))
            except AssertionError as error:
                rows[what] = {"failed": str(error)}
        print(what, rows[what], flush=True)
    if arguments.out:
        write_result(arguments.out, {"rows": rows})
    return any("failed" in row for row in rows.values())


if __name__ == "__main__":
    sys.exit(main())
