"""Models on meshes of two dimensions, saved and loaded: what runs on four ranks for tests/distributed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import memopt
from tests.helpers import sharded

STEPS = 2
SPEC, OVERRIDES = "adamw-8bit+fp32", {"columns": "32bit", "deep": "32bit"}


class Meshed(nn.Module):
    """bf16 with masters: what a rank has is rows, columns, both, all, or no DTensor at all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Parameter(torch.randn(255, 70))
        self.columns = nn.Parameter(torch.randn(66, 71))
        self.deep = nn.Parameter(torch.randn(9, 5, 6))
        self.twice = nn.Parameter(torch.randn(64, 70))
        self.norm = nn.Parameter(torch.randn(70))
        self.plain = nn.Parameter(torch.randn(7))
        self.bfloat16()


def meshed(swapped: bool = False) -> tuple[nn.Module, memopt.Optimizer]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    placements = {
        "rows": (Replicate(), Shard(0)),
        "columns": (Shard(0), Shard(1)),
        "deep": (Replicate(), Shard(2)),
        "twice": (Shard(0), Shard(0)),
        "norm": (Replicate(), Replicate()),
    }
    model = Meshed()
    for name, where in placements.items():
        where = tuple(reversed(where)) if swapped else where
        setattr(model, name, nn.Parameter(distribute_tensor(getattr(model, name).detach(), mesh, where)))
    return model, memopt.create(model, f"{SPEC}/zero3", overrides=OVERRIDES)


def hsdp() -> tuple[nn.Module, memopt.Optimizer]:
    from torch.distributed.device_mesh import init_device_mesh

    model = sharded.uneven_model()
    memopt.shard(model, "adamw-8bit/zero3", mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "shard")))
    return model, memopt.create(model, "adamw-8bit/zero3")


def loaded(path: Any, built: tuple[nn.Module, memopt.Optimizer]) -> list[Tensor]:
    model, opt = built
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    memopt.load(path, model=model, optimizer=opt, rng=False)
    sharded.drive(model, opt, STEPS, STEPS)
    return [sharded.whole(p) for p in model.parameters()]


def everything(path: str) -> dict[str, Any]:
    for name, build in (("meshed", meshed), ("hsdp", hsdp)):
        model, opt = build()
        sharded.drive(model, opt, 0, STEPS)
        memopt.save(f"{path}/{name}", model=model, optimizer=opt, asynchronous=name == "hsdp").wait()
    return {
        "path": path,
        "meshed": loaded(f"{path}/meshed", meshed()),
        "swapped": loaded(f"{path}/meshed", meshed(swapped=True)),
        "alone": loaded(f"{path}/alone", meshed()),
        "hsdp": loaded(f"{path}/hsdp", hsdp()),
    }


def alone(steps: int) -> tuple[nn.Module, memopt.Optimizer]:
    model = Meshed()
    opt = memopt.create(model, SPEC, overrides=OVERRIDES)
    sharded.drive(model, opt, 0, steps)
    return model, opt
