"""What the tests of DeepSpeed's flat vectors share: an engine, gradients that are chosen, and what each rank has."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import memopt
from tests.helpers import ranks
from tests.helpers.cases import HYPER, live_nbytes
from tests.helpers.flattened_cases import CASES, MORE
from tests.helpers.sharded import Uneven

STEPS = 3


class Chosen(Uneven):
    """Its gradients are what :func:`gradient` says, on every rank and so in their mean."""

    def forward(self, step: int) -> Tensor:
        return sum((p.float() * gradient(step, i, shape_of(p))).sum() for i, p in enumerate(self.parameters()))  # type: ignore[return-value]


def shape_of(p: Any) -> tuple[int, ...]:
    return tuple(getattr(p, "ds_shape", p.shape))


def gradient(step: int, index: int, shape: tuple[int, ...]) -> Tensor:
    """Of 6 significant bits, so that sums over three ranks and a third of them are exact, in bf16 too."""
    g = torch.Generator().manual_seed(1000 * step + index)
    bits = torch.randn(shape, generator=g).view(torch.int32)
    return (bits & ~(2**18 - 1)).view(torch.float32)


def model_of(dtype: torch.dtype, frozen: str = "") -> Chosen:
    torch.manual_seed(0)
    model = Chosen().to(dtype)
    for name, p in model.named_parameters():
        p.requires_grad = name != frozen
    return model


def made(model: nn.Module, spec: str, groups: int = 1, **keywords: Any) -> memopt.Optimizer:
    named = list(model.named_parameters())
    some = [{"params": named[i::groups], "weight_decay": 0.1 * i} for i in range(groups)] if groups > 1 else named
    return memopt.create(some, spec, **HYPER.get(memopt.parse(spec).rule, {}), **keywords)


def started(
    spec: str,
    stage: int,
    offload: bool = False,
    dtype: torch.dtype = torch.float32,
    groups: int = 1,
    zero: dict[str, Any] | None = None,
    frozen: str = "",
    **keywords: Any,
) -> tuple[Any, memopt.Optimizer]:
    """An engine over this rank's group, and the optimizer that it steps."""
    from memopt.integrations.deepspeed import check_engine

    deepspeed = ranks.deepspeed_on_gloo()
    config = memopt.deepspeed_config(f"adamw/zero{stage}" if stage else "adamw", offload=offload)
    low = {torch.bfloat16: {"bf16": {"enabled": True}}, torch.float16: {"fp16": {"enabled": True, "loss_scale": 256}}}
    config |= low.get(dtype, {})
    config["zero_optimization"].update(zero or {})
    model = model_of(dtype, frozen)
    optimizer = made(model, spec, groups, **keywords)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    check_engine(engine)
    return engine, optimizer


def drive(engine: Any, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        engine.backward(engine(step))
        engine.step()


def alone(
    spec: str, steps: int, dtype: torch.dtype = torch.float32, groups: int = 1, frozen: str = "", **keywords: Any
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Parameters and state of one process, in fp32 as DeepSpeed's vectors are."""
    model = model_of(dtype, frozen).float()
    optimizer = made(model, spec, groups, **keywords)
    for step in range(steps):
        for i, p in enumerate(model.parameters()):
            p.grad = gradient(step, i, tuple(p.shape)) if p.requires_grad else None
        optimizer.step()
    return (
        {name: p.detach() for name, p in model.named_parameters()},
        {name: optimizer.state[p] for name, p in model.named_parameters()},
    )


def found(optimizer: memopt.Optimizer) -> dict[str, tuple[int, int, Tensor, Any, dict[str, Tensor]]]:
    """Of each parameter that is stepped here: its elements [start, stop), their values, its rows and its state."""
    return {
        f.origin.name: (
            *f.span,
            f.part.detach().reshape(-1).clone(),
            tuple(f.rows),
            {key: x.clone() for key, x in optimizer.state[f.part].items()},
        )
        for f in optimizer.partition.fragments
        if f.is_here
    }


def run_case(spec: str, stage: int, offload: bool, dtype: str, groups: int) -> dict[str, Any]:
    engine, optimizer = started(spec, stage, offload, getattr(torch, dtype), groups)
    drive(engine, 0, STEPS)
    shapes = {name: shape_of(p) for name, p in engine.module.named_parameters()}
    predicted = memopt.price(
        shapes,
        spec,
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        deepspeed=stage,
        **HYPER.get(memopt.parse(spec).rule, {}),
    )
    after = found(optimizer)
    return {
        "found": after,
        "same_ledger": groups > 1 or predicted == optimizer.ledger(),
        "same_bytes": live_nbytes(optimizer) == optimizer.ledger().nbytes,
        "explain": optimizer.explain(),
        "resumed": resumed(engine, optimizer, lambda: started(spec, stage, offload, getattr(torch, dtype), groups)),
    }


def resumed(engine: Any, optimizer: memopt.Optimizer, again: Any) -> list[str]:
    """What is not the same, bit for bit, after two more steps of this engine and of another that loaded what this one
    saved."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    engine.save_checkpoint(folder[0], tag="middle")
    drive(engine, STEPS, 2)
    other, second = again()
    other.load_checkpoint(folder[0], tag="middle")
    drive(other, STEPS, 2)
    one, two = found(optimizer), found(second)
    return [
        f"{name} {key}"
        for name in one
        for key in ("values", *one[name][4])
        if not torch.equal(*(x[name][2] if key == "values" else x[name][4][key] for x in (one, two)))
    ]


def collectives(convention: str) -> int:
    """How many collectives a step of a whole-tensor rule takes."""
    engine, optimizer = started("adafactor", 3, convention=convention)
    drive(engine, 0, 1)
    count, whole, step = [0], dist.all_reduce, optimizer.step

    def counted(*args: Any, **keywords: Any) -> Any:
        count[0] += 1
        return whole(*args, **keywords)

    def stepped(*args: Any) -> Any:
        dist.all_reduce = counted
        try:
            return step(*args)
        finally:
            dist.all_reduce = whole

    optimizer.step = stepped  # type: ignore[method-assign]
    drive(engine, 1, 1)
    return count[0]


def others() -> dict[str, Any]:
    """Sub-groups, overrides, places and what is refused, on two ranks."""
    made_of: dict[str, Any] = {}
    for name, (spec, stage, zero, keywords) in {
        "sub-groups": ("adafactor", 3, {"sub_group_size": 10000}, {}),
        "frozen": ("came", 2, {}, {"frozen": "odder"}),
        "overrides": ("adamw-8bit", 2, {}, {"overrides": {"odd": "32bit"}}),
        "host": ("adafactor-8bit@cpu", 3, {}, {}),
        "disk": ("adamw-factored@disk", 1, {}, {"directory": tempfile.mkdtemp()}),
    }.items():
        engine, optimizer = started(spec, stage, zero=zero, **keywords)
        drive(engine, 0, STEPS)
        made_of[name] = found(optimizer), optimizer.explain()
    return {
        "found": made_of,
        "collectives": {c: collectives(c) for c in ("absolute", "transformers")},
        "refused": refusals(),
        "flat": flat_groups(),
    }


def refusals() -> dict[str, str]:
    messages = {}

    def refused(name: str, call: Any, kind: type[Exception] = RuntimeError) -> None:
        with pytest.raises(kind) as error:
            call()
        messages[name] = str(error.value)

    engine, _ = started("adafactor", 2, zero={"round_robin_gradients": True})
    refused("another order", lambda: drive(engine, 0, 1))
    engine, _ = started("adafactor", 2)
    next(engine.module.parameters()).tensor_model_parallel = True
    refused("tensor parallelism", lambda: drive(engine, 0, 1))
    engine, _ = started("adafactor@cpu", 2, offload_gradients=True)
    refused("offload_gradients", lambda: drive(engine, 0, 1))
    engine, _ = started("adamw/zero1", 2)
    refused("partition", lambda: drive(engine, 0, 1))
    engine, optimizer = started("adafactor", 2)
    drive(engine, 0, 1)
    refused("convert_", lambda: optimizer.convert_("came"), ValueError)
    refused("save", lambda: memopt.save(tempfile.mkdtemp(), optimizer=optimizer), ValueError)
    refused("pickle", optimizer.__getstate__, TypeError)
    refused("group", lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]}))
    state = optimizer.state_dict()
    state["memopt"]["cut"]["odd"] = [0, 5]
    refused("cut elsewhere", lambda: optimizer.load_state_dict(state), ValueError)
    engine, optimizer = started("adamw-8bit", 2)
    optimizer.param_groups[0]["moe"] = True
    refused("experts", lambda: drive(engine, 0, 1))
    refused("elastic", lambda: started("adafactor", 2, zero={"elastic_checkpoint": True}))
    engine, optimizer = started("adamw-8bit", 2)
    drive(engine, 0, 1)
    refused("convert_ vectors", lambda: optimizer.convert_("adafactor"), ValueError)
    return messages


def flat_groups() -> tuple[list[str], list[str], bool]:
    """Two groups of an element-wise rule: warnings, the vectors' names, and whether the price is the ledger's."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine, optimizer = started("adamw-8bit", 2, groups=2)
        drive(engine, 0, 2)
    names = [line.parameter for line in optimizer.ledger()]
    engine, optimizer = started("adamw-8bit", 3)
    drive(engine, 0, 1)
    shapes = {name: shape_of(p) for name, p in engine.module.named_parameters()}
    optimizer.param_groups[0]["params"] = [p for p in optimizer.state if optimizer.state[p]]
    same = optimizer.ledger() == memopt.price(shapes, "adamw-8bit", world_size=2, rank=dist.get_rank(), deepspeed=3)
    return [str(w.message) for w in caught if "memopt" in str(w.filename)], names, same


def more(world: int) -> dict[Any, Any]:
    return {case: run_case(*case) for case in MORE[world]}


def everything(world: int, folder: str) -> dict[Any, Any]:
    from tests.helpers import flattened_moves

    results: dict[Any, Any] = {case: run_case(*case) for case in CASES[world]}
    flattened_moves.moved(world, folder)
    return {
        **results,
        **({"others": others()} if world == 2 else {"fp16": flattened_moves.in_fp16()} if world == 1 else {}),
    }


@ranks.once
def session(world: int) -> Any:
    """What every rank found."""
    from tests.helpers import flattened_moves

    if before := flattened_moves.PLACES[world][0]:
        session(before)  # saves what this one loads
    return ranks.run(everything, world, world, flattened_moves.saved_in())


@ranks.once
def session_of(world: int, case: Any) -> Any:
    """What every rank found in the session that has this case."""
    return session(world) if case in CASES[world] else longer(world)


@ranks.once
def longer(world: int) -> Any:
    return ranks.run(more, world, world)


def whole(session: Any, of: Any, name: str, like: Tensor) -> Tensor:
    """The parameter from the elements of all ranks, each of which one rank has."""
    result = torch.full((like.numel(),), float("nan"))
    for rank in map(of, session):
        if name in rank:
            start, stop, values, *_ = rank[name]
            assert result[start:stop].isnan().all()
            result[start:stop] = values
    return result.view(like.shape)
