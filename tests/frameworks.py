"""One small training script, run by each framework; what it returns is compared with the bare script's."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

import memopt

STEPS, BATCH, SAVED_AT = 8, 8, 4
LR = 1e-2
MAX_NORM = 1.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(67, 67) for _ in range(2))
        self.head = nn.Linear(67, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x)  # type: ignore[no-any-return]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def data(step: int) -> Tensor:
    """This rank's part of a batch."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return torch.randn(BATCH, 67, generator=torch.Generator().manual_seed(step)).chunk(world)[rank]


def bare(spec: str, clip: bool = True, accumulate: int = 2) -> list[float]:
    """Losses of the script without any framework."""
    model = net()
    optimizer = memopt.create(model, spec, lr=LR)
    losses = []
    for step in range(STEPS):
        loss = model(torch.randn(BATCH, 67, generator=torch.Generator().manual_seed(step))).square().mean()
        (loss / accumulate).backward()
        if step % accumulate == accumulate - 1:
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def under_accelerate(kind: str, spec: str, path: str) -> dict[str, Any]:
    """Accumulation, clipping, save_state and load_state in the middle; the losses, and those after loading."""
    os.environ.update(ACCELERATE_TORCH_DEVICE="cpu", LOCAL_RANK=os.environ["RANK"])
    import accelerate
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = accelerate.PartialState(backend="gloo")
    more: dict[str, Any] = {}
    if kind == "fsdp2":
        state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        more["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Linear"]
        )
    else:
        state._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, **more)
    model = net()
    optimizer = memopt.create(model, spec, lr=LR)
    model, prepared = accelerator.prepare(model, optimizer)

    def steps(first: int) -> list[float]:
        losses = []
        for step in range(first, STEPS):
            with accelerator.accumulate(model):
                loss = model(data(step)).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                prepared.step()
                prepared.zero_grad()
            losses.append(loss.item())
            if step == SAVED_AT - 1:
                save()
        return losses

    refused = ""

    def save() -> None:
        nonlocal refused
        try:
            accelerator.save_state(path)
        except RuntimeError as error:
            refused = str(error)
        accelerator.wait_for_everyone()

    losses = steps(0)
    if refused:
        return {"losses": losses, "refused": refused}
    accelerator.load_state(path)
    return {"losses": losses, "resumed": steps(SAVED_AT), "explain": optimizer.explain()}


def under_deepspeed(path: str, cases: list[tuple[str, int, bool]]) -> dict[str, Any]:
    """Each (spec, stage, offload), saved and loaded; and a spec that cannot be."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=os.environ["RANK"], LOCAL_SIZE=os.environ["WORLD_SIZE"])
    import deepspeed

    from memopt.integrations.deepspeed import check_engine

    def started(spec: str, stage: int, offload: bool) -> Any:
        model = net()
        config = memopt.deepspeed_config(f"{spec}/zero{stage}", micro_batch=BATCH // 2, offload=offload)
        optimizer = memopt.create(model, spec, lr=LR)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        check_engine(engine)
        return engine

    def steps(engine: Any, first: int) -> list[float]:
        losses = []
        for step in range(first, STEPS):
            loss = engine(data(step)).square().mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
            if step == SAVED_AT - 1:
                engine.save_checkpoint(path, tag=f"at{first}")
        return losses

    found: dict[str, Any] = {}
    for spec, stage, offload in cases:
        losses = steps(started(spec, stage, offload), 0)
        again = started(spec, stage, offload)
        again.load_checkpoint(path, tag="at0")
        found[f"{spec} {stage}{' offload' * offload}"] = losses, steps(again, SAVED_AT)
    model = net()
    config = memopt.deepspeed_config("adamw/zero1", micro_batch=BATCH // 2)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=memopt.create(model, "adafactor"), config=config, dist_init_required=False
    )
    try:
        steps(engine, 0)
    except RuntimeError as error:
        found["adafactor"] = str(error)
    return found
