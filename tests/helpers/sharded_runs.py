"""What runs on four ranks for the tests of ZeRO-2 and ZeRO-3, once for each file of them."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import memopt
from tests.helpers import meshes, ranks, sharded
from tests.helpers.cases import HYPER, assert_same_bits, live_nbytes
from tests.helpers.loops import Net

WORLD = 4
STEPS = 6
#: A sample; benchmarks/sharding_matrix.py runs every rule × format × partition on 1 to 4 ranks.
SPECS = [
    "adamw/zero2",
    "adamw/zero3",
    "adamw-8bit/zero3",
    "lion-4bit/zero2",
    "rmsprop-fp8/zero3",
    "sgd-bf16/zero3",
    "adafactor/zero2",
    "adafactor-32bit/zero3",
    "came/zero3",
    "adamw-factored/zero3",
    "adamw-8bit@paged/zero3",
    "adafactor/zero1",
    "adammini-8bit/zero3",
    "adamw-8bit+stochastic/zero3",
    "lamb/zero3",
    "lamb-8bit/zero1",
    "came-8bit/zero3",
    "came-4bit/zero1",
    "stableadamw-8bit/zero2",
    "muon/zero2",
    "muon-8bit/zero3",
    "sinkgd-8bit/zero3",
    "prodigy-8bit/zero3",
    "apollo-8bit/zero3",
]


def run_spec(spec: str) -> dict[str, Any]:
    model, opt = sharded.build(spec)
    sharded.drive(model, opt, 0, STEPS)
    hyper = HYPER.get(memopt.parse(spec).rule, {})
    predicted = memopt.price(sharded.uneven_model(), spec, world_size=WORLD, rank=dist.get_rank(), **hyper)
    return {
        "model": [sharded.whole(p) for p in model.parameters()],
        "state": [dict(opt.state[p]) for p in model.parameters()],
        "same_ledger": predicted == opt.ledger(),
        "same_price": spec.endswith("1") or predicted == memopt.price(model, spec, **hyper),
        "same_bytes": live_nbytes(opt) == predicted.nbytes,
        "explain": opt.explain(),
    }


def train_blocks(spec: str, world: int, mesh: Any = None) -> list[Tensor]:
    """Losses and parameters of a real training step, clipped; each rank has its own part of the batch."""
    torch.manual_seed(1)
    model = Net()
    if "/" in spec:
        memopt.shard(model, spec, mesh=mesh)
    opt = memopt.create(model, spec, lr=1e-2)
    rank = dist.get_rank() if world > 1 else 0
    for step in range(5):
        data = torch.randn(8, 67, generator=torch.Generator().manual_seed(step))
        model(data.chunk(world)[rank]).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        opt.step()
        opt.zero_grad()
    return [sharded.whole(p) for p in model.parameters()]


def two_dimensions() -> dict[Any, Any]:
    """HSDP, and FSDP over tensor parallelism: parameters after a few steps, and what is refused."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    found: dict[Any, Any] = {"hsdp": train_blocks("adamw-8bit/zero3", WORLD, mesh)}
    placements = {
        "rows": (Shard(0), Replicate()),
        "columns": (Shard(0), Shard(1)),
        "replicas": (Replicate(), Shard(0)),
        "twice": (Shard(0), Shard(0)),
    }
    for name, spec in [
        ("rows", "adamw-8bit/zero3"),
        ("replicas", "adafactor/zero3"),
        ("columns", "adamw/zero3"),
        ("twice", "adafactor/zero3"),
        ("replicas", "muon/zero3"),
        ("rows", "muon-8bit/zero3"),
    ]:
        torch.manual_seed(0)
        p = nn.Parameter(distribute_tensor(torch.randn(255, 70), mesh, placements[name]))
        opt = memopt.create([("w", p)], spec)
        for step in range(3):
            p.grad = sharded.as_sharded(torch.randn(255, 70, generator=torch.Generator().manual_seed(step)), p)
            opt.step()
        found[name, spec] = sharded.whole(p), opt.ledger() == memopt.price([("w", p)], spec)
    for spec in ("adamw-8bit/zero3", "adafactor/zero3", "adafactor-32bit/zero3"):
        p = nn.Parameter(distribute_tensor(torch.randn(255, 70), mesh, placements["columns"]))
        p.grad = p.detach().clone()
        opt = memopt.create([("w", p)], spec)
        with pytest.raises(RuntimeError, match="w is cut along another dimension") as refused:
            opt.step()
        assert not opt.state[p]
        found[spec] = str(refused.value)
    return found


def over_tensor_parallelism() -> str:
    """fully_shard over parallelize_module: the rows memopt steps are those that are here."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 64, bias=False), nn.Linear(70, 66, bias=False))
    wholes = [p.detach().clone() for p in model.parameters()]
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": ColwiseParallel()})
    memopt.shard(model, "adamw-8bit/zero3", mesh=mesh["dp"])
    opt = memopt.create(model, "adamw-8bit/zero3")
    even, uneven = model.parameters()
    rows = opt.partition.local_rows(even)
    assert_same_bits(even.to_local(), wholes[0][rows.first : rows.stop])
    even.grad = even.detach().clone()
    uneven.grad = uneven.detach().clone()
    with pytest.raises(RuntimeError, match=r"1\.weight has 66 rows, which 4 ranks of data") as error:
        opt.step()
    return str(error.value)


def refusals() -> dict[str, Any]:
    messages = {}
    model, opt = sharded.uneven_model(), None
    opt = memopt.create(model, "adamw/zero3")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for name, spec in [("whole", "adamw/zero3"), ("plain", "adamw-8bit"), ("zero1", "adamw-8bit/zero1")]:
        model = sharded.uneven_model()
        if name != "whole":
            memopt.shard(model, "adamw/zero3")
        opt = memopt.create(model, spec)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        with pytest.raises(RuntimeError) as error:
            opt.step()
        messages[name] = str(error.value), len(opt.state)
    return messages


def nan_on_one_rank() -> Any:
    model, opt = sharded.build("adamw-8bit/zero3")
    sharded.drive(model, opt, 0, 1)
    before = [p.to_local().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = sharded.as_sharded(torch.ones(p.shape), p)
    if dist.get_rank() == WORLD - 1:
        model.odd.grad.to_local()[0, 0] = float("nan")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.step()
    same = all(torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True))
    return opt.skipped_steps, same, [str(w.message) for w in caught if "NaN" in str(w.message)]


def collectives() -> int:
    """How many collectives a step of a whole-tensor rule takes."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(30)))
    memopt.shard(model, "adafactor/zero3")
    opt = memopt.create(model, "adafactor/zero3")
    for p in model.parameters():
        p.grad = sharded.as_sharded(torch.ones(p.shape), p)
    opt.step()
    count, whole = [0], dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return whole(*args, **kwargs)

    dist.all_reduce = counted
    opt.step()
    dist.all_reduce = whole
    return count[0]


def of_specs() -> dict[str, Any]:
    return {
        "specs": {spec: run_spec(spec) for spec in SPECS},
        "nan": nan_on_one_rank(),
        "collectives": collectives(),
    }


def of_meshes() -> dict[str, Any]:
    return {
        "blocks": {spec: train_blocks(spec, WORLD) for spec in ("adamw-8bit/zero2", "adamw-8bit/zero3")},
        "two": two_dimensions(),
        "refusals": refusals(),
    }


def of_checkpoints(path: str) -> dict[str, Any]:
    return {"mesh": meshes.everything(path), "tp": over_tensor_parallelism()}


@ranks.once
def session(part: Any) -> Any:
    """One file of tests runs one part: files may be run by different processes."""
    if part is not of_checkpoints:
        return ranks.run(part, WORLD)
    path = tempfile.mkdtemp()
    model, opt = meshes.alone(meshes.STEPS)
    memopt.save(f"{path}/alone", model=model, optimizer=opt)
    return ranks.run(part, WORLD, path)
