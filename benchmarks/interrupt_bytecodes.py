"""Ctrl-C at random bytecodes of a step, a load, a conversion and a save: unchanged, complete, or said.

    python benchmarks/interrupt_bytecodes.py --tries 2000 --out benchmarks/results/interrupt_bytecodes.json

KeyboardInterrupt is raised before a bytecode of memopt's own functions, drawn at random from all that the work
executes, in every placement. Then the optimizer must be as it was before, as it is after the work, or refuse a step,
``save``, ``state_dict`` and ``convert_`` with a sentence; a conversion may also have stopped between two parameters,
which the same call finishes. Where it refused, a checkpoint is loaded. In all cases it is stepped on, and must go where
a twin goes that nobody interrupted: parameters, state and counts to the bit.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_sweep import require
from interrupt_case import Case, Snapshot, gradients, same, snapshot, step
from provenance import write_result

import memopt
from memopt.checkpoint.opened import Checkpoint
from memopt.kernels import loader

HERE = os.path.dirname(memopt.__file__) + os.sep
PLACES = ("device", "paged", "paged resident", "host", "cpu", "disk", "disk kept", "mixed")
#: On the reference path, plain torch without kernels.
REFERENCE = ("reference device", "reference disk kept", "reference mixed")
WORKS = ("step", "first step", "load", "load_state_dict", "convert_ format", "convert_ rule", "convert_ place", "save")


class Interrupt:
    """Raise KeyboardInterrupt before the ``at``-th bytecode (from 1; 0 only counts) of memopt's functions."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def _enter(self, frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(HERE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._inside

    def _inside(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "opcode":
            self.count += 1
            if self.count == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._inside

    def run(self, work: Callable[[], Any]) -> bool:
        """Whether it was interrupted."""
        sys.settrace(self._enter)
        try:
            work()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False


def refuses(case: Case, model: torch.nn.Module, opt: memopt.Optimizer) -> None:
    gradients(model, 9)
    for use in (
        opt.step,
        opt.state_dict,
        lambda: opt.convert_("adamw-4bit"),
        lambda: memopt.save(case.folder / "refused", model=model, optimizer=opt),
    ):
        try:
            use()
        except RuntimeError as error:
            require("Load a checkpoint" in str(error) or "the same call" in str(error), str(error))
        else:
            raise AssertionError("state that may be torn was taken for whole")


def one(case: Case, what: str, at: int, states: dict[str, Snapshot], beyond: dict[str, Snapshot]) -> str:
    """What became of it: "unchanged", "complete", "between" (a conversion, gone on with) or "refused". ``states`` are
    what an uninterrupted twin has, ``beyond`` what it has a step later."""
    model, opt = case.ready()
    work = case.work(what, model, opt)
    interrupted = Interrupt(at).run(work)
    if what == "save":
        saved = memopt.load(case.folder / "saved").step
        require(saved == 2, f"the newest is of step {saved}")
        for path in (case.folder / "saved").glob("0*"):
            Checkpoint(path).close()
    if opt.unfinished is not None:
        refuses(case, model, opt)
        work()
        require(same(snapshot(model, opt), states["complete"]), "the same call did not finish")
        outcome, then = "between", "complete"
    elif opt.integrity.torn is not None:
        refuses(case, model, opt)
        memopt.load(case.folder / "after2", model=model, optimizer=opt)
        outcome, then = "refused", "loaded"
        if str(opt.spec) != states["loaded"][3]:  # a conversion that had taken the new spec already
            other, twin = case.fresh()
            twin.convert_(str(opt.spec), lr=opt.param_groups[0]["lr"])
            memopt.load(case.folder / "after2", model=other, optimizer=twin)
            require(same(snapshot(model, opt), snapshot(other, twin)), "what was loaded is not what a twin loads")
            step(other, twin, 7)
            beyond = {"loaded": snapshot(other, twin)}
            case.done(twin)
        else:
            require(same(snapshot(model, opt), states["loaded"]), "what was loaded is not what was saved")
    else:
        now = snapshot(model, opt)
        found = [name for name in ("complete", "unchanged") if same(now, states[name])]
        outcome = then = found[0] if found else "between"
        if not found:
            require(what.startswith("convert_"), "neither as before nor as after, and not refused")
            spec = memopt.parse(states["complete"][3])
            opt.convert_(spec if case.place == "mixed" else spec.replace(overrides={}))
            require(same((*snapshot(model, opt)[:2], *now[2:]), (*states["complete"][:2], *now[2:])), "cannot go on")
            then = "complete"
    step(model, opt, 7)
    gone = snapshot(model, opt)
    require(same((*gone[:2], 0), (*beyond[then][:2], 0)), f"{outcome}, and goes elsewhere than its twin")
    case.done(opt)
    return outcome if interrupted else f"{outcome}, in a destructor"


@contextmanager
def path_of(place: str) -> Iterator[None]:
    """The kernels, or the plain torch code that defines them."""
    before = loader._loaded
    if place.startswith("reference"):
        loader._loaded = loader.Missing("this sweep is of the reference path")
    try:
        yield
    finally:
        loader._loaded = before


def sweep(place: str, what: str, tries: int, seed: int = 0, spec: str = "adamw") -> dict[str, Any]:
    with path_of(place):
        return _sweep(place, what, tries, seed, spec)


def _sweep(place: str, what: str, tries: int, seed: int, spec: str) -> dict[str, Any]:
    draw = random.Random(f"{place} {what} {seed}")
    with tempfile.TemporaryDirectory() as name:
        case = Case(place, Path(name), spec)
        if what == "save":
            model, opt = case.ready()
            memopt.save(case.folder / "saved", model=model, optimizer=opt)
            case.done(opt)
        model, opt = case.ready()
        loaded = snapshot(model, opt)
        step(model, opt, 7)
        beyond = {"loaded": snapshot(model, opt)}
        case.done(opt)
        model, opt = case.ready()
        work = case.work(what, model, opt)
        before = snapshot(model, opt)
        counter = Interrupt(0)
        counter.run(work)
        after = snapshot(model, opt)
        step(model, opt, 7)
        beyond["complete"] = snapshot(model, opt)
        case.done(opt)
        model, opt = case.ready()
        case.work(what, model, opt)
        step(model, opt, 7)
        beyond["unchanged"] = snapshot(model, opt)
        case.done(opt)
        states = {"loaded": loaded, "unchanged": before, "complete": after}
        outcomes: Counter[str] = Counter()
        for _ in range(tries):
            at = draw.randrange(1, counter.count + 1)
            try:
                outcomes[one(case, what, at, states, beyond)] += 1
            except Exception as error:
                if os.environ.get("SHOW"):
                    raise
                raise AssertionError(
                    f"{place}, {what}, bytecode {at} of {counter.count}: {type(error).__name__}: {error}"
                ) from error
    return {"bytecodes": counter.count, "outcomes": dict(outcomes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=2000, help="of each work, over all placements")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    failed = 0
    for what in WORKS:
        for place in (*PLACES, *REFERENCE):
            if arguments.only not in f"{what}, {place}":
                continue
            begin = time.monotonic()
            try:
                rows[f"{what}, {place}"] = sweep(place, what, -(-arguments.tries // len(PLACES)), arguments.seed)
            except AssertionError as error:
                rows[f"{what}, {place}"] = {"failed": str(error)}
                failed += 1
            print(f"{what}, {place}: {rows[f'{what}, {place}']} {time.monotonic() - begin:.0f} s", flush=True)
    if arguments.out:
        write_result(arguments.out, {"rows": rows})
        arguments.out.with_suffix(".md").write_text(table(rows))
    sys.exit(failed > 0)


def table(rows: dict[str, Any]) -> str:
    kinds = ("unchanged", "complete", "between", "refused")
    lines = [
        "# Ctrl-C at random bytecodes",
        "",
        "`benchmarks/interrupt_bytecodes.py`: what became of the optimizer. Where it refused, a checkpoint was loaded;",
        "a conversion that was between two parameters was gone on with. All then stepped to the bit as their twins.",
        "",
        f"| work, placement | bytecodes | tries | {' | '.join(kinds)} |",
        f"|---|---|---|{'---|' * len(kinds)}",
    ]
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"| {name} | failed: {row['failed']} |")
            continue
        counts = [sum(n for k, n in row["outcomes"].items() if k.startswith(kind)) for kind in kinds]
        lines.append(f"| {name} | {row['bytecodes']} | {sum(counts)} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
