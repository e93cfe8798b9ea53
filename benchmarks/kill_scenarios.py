"""What is killed by kill_every_call.py: work from a folder to a folder, and what may be there then."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import system_calls
from checkpoint_sweep import require

import memopt
from memopt.checkpoint import source_of
from memopt.checkpoint.conversion.converted_source import Converted
from memopt.checkpoint.conversion.rewrite import rewrite
from memopt.checkpoint.exporting import exported, write
from memopt.checkpoint.io import lock
from memopt.checkpoint.opened import Checkpoint

WIDTH = 72
#: A rank that outlives another ends within so many seconds: a group's timeout is a sixth of them, and gloo tries five
#: times to connect two ranks.
PATIENCE_S = 60


def made(value: float, spec: str = "adamw", **fields: Any) -> tuple[torch.nn.Linear, memopt.Optimizer]:
    """A model and state that hold one number everywhere."""
    model = torch.nn.Linear(WIDTH, WIDTH)
    opt = memopt.create(model, spec, **fields)
    opt.init_state()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
            if not fields:
                opt.state[p]["exp_avg"].fill_(value)
    return model, opt


def value_of(path: Path, **keywords: Any) -> float:
    """The one number of what is saved there, model (if it is a checkpoint) and state."""
    model, opt = made(-1.0)
    if (path / "manifest.json").exists() or any(path.glob("0*")):
        memopt.load(path, model=model, optimizer=opt, rng=False, **keywords)
        tensors = [t for p in model.parameters() for t in (p.detach(), opt.state[p]["exp_avg"])]
    else:
        memopt.load(path, optimizer=opt, hyper=False, rule="adamw", **keywords)
        tensors = [opt.state[p]["exp_avg"] for p in model.parameters()]
    values = {float(x) for t in tensors for x in t.unique()}
    require(len(values) == 1, f"{path} holds numbers of several saves: {sorted(values)}")
    return values.pop()


class Scenario:
    """``prepare`` makes the folder that all begin from, ``work`` is what is killed, ``read`` returns what is there:
    "old" or "new", and raises for anything else. ``clean`` says what may be in the folder after the work succeeded."""

    name = ""

    def prepare(self, folder: Path) -> None:
        raise NotImplementedError

    def work(self, folder: Path) -> None:
        raise NotImplementedError

    def read(self, folder: Path) -> str:
        raise NotImplementedError

    def clean(self, folder: Path) -> bool:
        return not any(p.name.startswith((".writing-", ".removing-")) for p in folder.iterdir())


class Save(Scenario):
    def __init__(self, name: str, **keywords: Any) -> None:
        self.name, self.keywords = name, keywords

    def prepare(self, folder: Path) -> None:
        model, opt = made(1.0)
        memopt.save(folder, model=model, optimizer=opt)
        opt.close()
        lock.release(id(model))

    def work(self, folder: Path) -> None:
        model, opt = made(2.0)
        memopt.save(folder, model=model, optimizer=opt, **self.keywords).wait()

    def read(self, folder: Path) -> str:
        for path in folder.glob("0*"):
            Checkpoint(path).close()
        return {1.0: "old", 2.0: "new"}[value_of(folder)]


class Convert(Save):
    """``memopt convert``: into a folder that has a checkpoint already."""

    def __init__(self) -> None:
        super().__init__("convert")

    def prepare(self, folder: Path) -> None:
        super().prepare(folder / "out")
        model, opt = made(2.0)
        memopt.save(folder / "in", model=model, optimizer=opt)
        opt.close()
        lock.release(id(model))

    def work(self, folder: Path) -> None:
        checkpoint = Checkpoint(folder / "in")
        rewrite(Converted(checkpoint.optimizer_of(), memopt.parse("adamw"), {}), checkpoint, folder / "out")

    def read(self, folder: Path) -> str:
        return super().read(folder / "out")

    def clean(self, folder: Path) -> bool:
        return super().clean(folder / "out")


class Export(Scenario):
    """A file is replaced; a folder is new."""

    def __init__(self, tool: str) -> None:
        self.tool, self.name = tool, f"export {tool}"
        self.is_folder = tool in ("deepspeed", "dcp")

    def prepare(self, folder: Path) -> None:
        folder.mkdir()
        if not self.is_folder:
            write(exported(source_of(made(1.0)[1]), self.tool), folder / "out")

    def work(self, folder: Path) -> None:
        if (folder / "out").is_dir():
            shutil.rmtree(folder / "out")
        write(exported(source_of(made(2.0)[1]), self.tool), folder / "out")

    def read(self, folder: Path) -> str:
        if self.is_folder and not (folder / "out").exists():
            return "old"
        return {1.0: "old", 2.0: "new"}[value_of(folder / "out")]

    def clean(self, folder: Path) -> bool:
        return [p.name for p in folder.iterdir()] == ["out"]


class Disk(Scenario):
    """Two steps are in the directory (or none); a third is taken by another process."""

    def __init__(self, name: str, before: int) -> None:
        self.name, self.before = name, before

    def steps(self, folder: Path, count: int) -> list[tuple[float, torch.Tensor]]:
        model = torch.nn.Linear(WIDTH, WIDTH)
        opt = memopt.create(model, "adamw@disk", directory=folder / "state", workspace="1MiB")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt.init_state()
        for _ in range(count):
            for p in model.parameters():
                p.grad = torch.full_like(p, 1.0 + float(opt.state[p]["step"]))
            opt.step()
        found = [(float(opt.state[p]["step"]), opt.state[p]["exp_avg"].clone()) for p in model.parameters()]
        opt.close()
        return found

    def prepare(self, folder: Path) -> None:
        folder.mkdir()
        if self.before:
            self.steps(folder, self.before)

    def work(self, folder: Path) -> None:
        self.steps(folder, 1)

    def read(self, folder: Path) -> str:
        found = self.steps(folder, 0)
        step = found[0][0]
        exp_avg = 0.0
        for i in range(int(step)):
            exp_avg += (1.0 + i - exp_avg) * (1 - 0.9)
        for this, mean in found:
            require(this == step, f"parameters of steps {step} and {this}")
            require(bool((mean - exp_avg).abs().max() < 1e-5), f"step {step} has another step's moments")
        return {self.before: "old", self.before + 1: "new"}[int(step)]

    def clean(self, folder: Path) -> bool:
        return len(list((folder / "state").iterdir())) == 3


class Ranks(Scenario):
    """Two ranks share a ``/zero1`` state; ``victim`` is killed, and the other must end by itself."""

    def __init__(self, victim: int, what: str, **keywords: Any) -> None:
        self.name = f"two ranks, {what}, rank {victim} killed"
        self.victim, self.keywords = victim, keywords
        self.disk = "@disk" in what

    def prepare(self, folder: Path) -> None:
        self.run(folder, 1.0, 0)

    def work(self, folder: Path) -> None:
        raise NotImplementedError

    def rank(self, rank: int, folder: Path, value: float) -> None:
        import torch.distributed as dist

        store = dist.TCPStore("localhost", self.port, is_master=False)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=PATIENCE_S // 6)
        )
        dist.barrier()
        system_calls.mark()
        if self.disk:
            found = folder / f"found-{rank}"
            try:
                found.write_text("{} {}".format(*self.step(folder, value)))
            except Exception as error:
                found.write_text(str(error))
                raise
        else:
            model, opt = made(value, "adamw/zero1")
            memopt.save(folder / "run", model=model, optimizer=opt, rng=False, **self.keywords).wait()
        dist.barrier()

    def found(self, folder: Path) -> str:
        """What both ranks find: old or new."""
        if not self.disk:
            return {1.0: "old", 2.0: "new"}[value_of(folder / "run")]
        trace, code = self.run(folder, 0.0, 0)
        said = [(folder / f"found-{rank}").read_text() for rank in range(2)]
        require(trace.status == 0 and code == 0, f"the state cannot be read: {said}")
        require(said[0] == said[1], f"the ranks are at different steps: {said}")
        return {"1.0 0.1": "old", "2.0 0.29": "new"}[said[0]]

    def step(self, folder: Path, value: float) -> tuple[float, float]:
        """One more step of gradients that are all one number, or with 0 none: the step and the moment there."""
        model = torch.nn.Linear(WIDTH, WIDTH)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt = memopt.create(model, "adamw@disk/zero1", directory=folder / "state", workspace="1MiB")
            opt.init_state()
        if value:
            for p in model.parameters():
                p.grad = torch.full_like(p, value)
            opt.step()
        found = {(float(s["step"]), round(float(x), 6)) for s in opt.state.values() for x in s["exp_avg"].unique()}
        require(len(found) == 1, f"states of several steps: {sorted(found)}")
        opt.close()
        return found.pop()

    def run(self, folder: Path, value: float, number: int, torn: bool = False) -> tuple[system_calls.Trace, int]:
        """Both ranks: what became of the victim, and the exit code of the other."""
        import torch.distributed as dist

        folder.mkdir(exist_ok=True)
        # Where ranks meet outlives them, as it does with torchrun: a FileStore is torn by a kill in one of its writes.
        server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self.port = server.port
        other = os.fork()
        if not other:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # a sentence that is expected
            code = 1
            try:
                self.rank(1 - self.victim, folder, value)
                code = 0
            finally:
                os._exit(code)
        child = system_calls.begin(lambda: self.rank(self.victim, folder, value))
        trace = system_calls.follow(child, number, torn, {other}, marked=True)
        return trace, system_calls.wait(other, PATIENCE_S)


def copy_of(template: Path, folder: Path) -> Path:
    """Without a lock: that is the process's that made it."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    return folder
