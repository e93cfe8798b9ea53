"""One optimizer in one placement, what is done with it when Ctrl-C comes, and what training goes on from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import memopt

WIDTH = 72


Snapshot = tuple[Any, ...]


class Case:
    """One optimizer in one placement, and what is done with it, from checkpoints after two and four steps."""

    def __init__(self, place: str, folder: Path, spec: str = "adamw") -> None:
        self.place, self.folder, self.spec, self.number = place.removeprefix("reference "), folder, spec, 0
        for steps in (2, 4):
            model, opt = self.fresh()
            for i in range(steps):
                step(model, opt, i)
            memopt.save(folder / f"after{steps}", model=model, optimizer=opt)
            self.done(opt)

    def fresh(self) -> tuple[torch.nn.Module, memopt.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH))
        name, _, how = self.place.partition(" ")
        more: dict[str, Any] = {"resident": "1MiB"} if how == "resident" else {}
        if how == "kept":
            self.number += 1
            more = {"directory": self.folder / f"state{self.number}"}
        if name == "mixed":
            more = {"overrides": {"0.*": "8bit@disk", "1.bias": "32bit@paged"}}
        suffix = "" if name in ("device", "mixed") else f"@{name}"
        return model, memopt.create(model, self.spec + suffix, lr=1e-2, **more)

    def done(self, opt: memopt.Optimizer) -> None:
        opt.close()
        shutil.rmtree(self.folder / f"state{self.number}", ignore_errors=True)

    def ready(self) -> tuple[torch.nn.Module, memopt.Optimizer]:
        """After two steps, and with a step behind it that prepared what the next needs."""
        model, opt = self.fresh()
        memopt.load(self.folder / "after2", model=model, optimizer=opt)
        return model, opt

    def work(self, what: str, model: torch.nn.Module, opt: memopt.Optimizer) -> Callable[[], Any]:
        spec = memopt.parse(self.spec)
        if what in ("step", "first step"):
            gradients(model, 2)
            if what == "step":  # what a step prepares is there
                opt.step()
                gradients(model, 3)
            return opt.step
        if what == "load":
            return lambda: memopt.load(self.folder / "after4", model=model, optimizer=opt)
        if what == "load_state_dict":
            other_model, other = self.fresh()
            memopt.load(self.folder / "after4", model=other_model, optimizer=other)
            state = other.state_dict()
            state["state"] = {
                k: {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in v.items()}
                for k, v in state["state"].items()
            }
            self.done(other)
            return lambda: opt.load_state_dict(state)
        if what == "save":
            return lambda: memopt.save(self.folder / "saved", model=model, optimizer=opt)
        target, more = {
            "convert_ format": (str(opt.spec).replace(spec.rule, f"{spec.rule}-8bit"), {}),
            "convert_ rule": (str(opt.spec).replace(spec.rule, "lion"), {"lr": 1e-4}),
            "convert_ place": (f"{self.spec}@{'paged' if 'paged' not in self.place else 'device'}", {}),
        }[what]
        return lambda: opt.convert_(target, **more)


def gradients(model: torch.nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=draw)


def step(model: torch.nn.Module, opt: memopt.Optimizer, seed: int) -> None:
    gradients(model, seed)
    opt.step()


def snapshot(model: torch.nn.Module, opt: memopt.Optimizer) -> Snapshot:
    """Everything that training goes on from. State of zeros that no step has touched is as good as none."""
    state = [
        {k: t.detach().clone() for k, t in opt.state[p].items()}
        if opt.state.get(p) and float(opt.state[p]["step"])
        else {}
        for p in model.parameters()
    ]
    hyper = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
    return [p.detach().clone() for p in model.parameters()], state, repr(hyper), str(opt.spec), opt.seed


def same(a: Snapshot, b: Snapshot) -> bool:
    return (
        all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
        and all(
            x.keys() == y.keys() and all(torch.equal(t, y[k]) for k, t in x.items())
            for x, y in zip(a[1], b[1], strict=True)
        )
        and a[2:] == b[2:]
    )
