"""What the tests of DeepSpeed's flat vectors share: an engine, gradients that are chosen, and what each rank has."""

from __future__ import annotations

import os
from typing import Any

import torch
from cases import HYPER
from sharded import Uneven
from torch import Tensor, nn

import memopt


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


def model_of(dtype: torch.dtype) -> Chosen:
    torch.manual_seed(0)
    return Chosen().to(dtype)


def made(model: nn.Module, spec: str, groups: int = 1, **keywords: Any) -> memopt.Optimizer:
    named = list(model.named_parameters())
    some = [{"params": named[i::groups], "weight_decay": 0.1 * i} for i in range(groups)] if groups > 1 else named
    return memopt.create(some, spec, **HYPER.get(memopt.parse(spec).rule, {}), **keywords)


def started(
    spec: str, stage: int, offload: bool = False, dtype: torch.dtype = torch.float32, groups: int = 1,
    zero: dict[str, Any] | None = None, **keywords: Any,
) -> tuple[Any, memopt.Optimizer]:  # fmt: skip
    """An engine over this rank's group, and the optimizer that it steps."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=os.environ["RANK"], LOCAL_SIZE=os.environ["WORLD_SIZE"])
    import deepspeed

    from memopt.integrations.deepspeed import check_engine

    config = memopt.deepspeed_config(f"adamw/zero{stage}" if stage else "adamw", offload=offload)
    if dtype is torch.bfloat16:
        config["bf16"] = {"enabled": True}
    config["zero_optimization"].update(zero or {})
    model = model_of(dtype)
    optimizer = made(model, spec, groups, **keywords)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    check_engine(engine)
    return engine, optimizer


def drive(engine: Any, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        engine.backward(engine(step))
        engine.step()


def alone(
    spec: str, steps: int, dtype: torch.dtype = torch.float32, groups: int = 1, **keywords: Any
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Parameters and state of one process, in fp32 as DeepSpeed's vectors are."""
    model = model_of(dtype).float()
    optimizer = made(model, spec, groups, **keywords)
    for step in range(steps):
        for i, p in enumerate(model.parameters()):
            p.grad = gradient(step, i, tuple(p.shape))
        optimizer.step()
    return ({name: p.detach() for name, p in model.named_parameters()},
            {name: optimizer.state[p] for name, p in model.named_parameters()})  # fmt: skip


def found(optimizer: memopt.Optimizer) -> dict[str, tuple[int, int, Tensor, Any, dict[str, Tensor]]]:
    """Of each parameter that is stepped here: its elements [start, stop), their values, its rows and its state."""
    return {
        f.origin.name: (*f.span, f.part.detach().reshape(-1).clone(), tuple(f.rows), dict(optimizer.state[f.part]))
        for f in optimizer.partition.fragments if f.is_here
    }  # fmt: skip
