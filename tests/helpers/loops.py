"""One small training script, bare and under each framework: the losses, and those after a checkpoint in the middle."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

import memopt
from tests.helpers.ranks import deepspeed_on_gloo

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


def bare(spec: str, accumulate: int = 2, **hyper: Any) -> list[float]:
    """Losses of the script without any framework."""
    model = net()
    optimizer = memopt.create(model, spec, lr=LR, **hyper)
    losses = []
    for step in range(STEPS):
        loss = model(torch.randn(BATCH, 67, generator=torch.Generator().manual_seed(step))).square().mean()
        (loss / accumulate).backward()
        if step % accumulate == accumulate - 1:
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _accelerator(kind: str, spec: str) -> dict[str, Any]:
    """What an Accelerator of this kind is made with, on a CPU."""
    if kind == "deepspeed":  # with offload to the host
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        deepspeed_on_gloo()
    import accelerate
    from accelerate.utils import DistributedType

    if kind == "deepspeed":
        config = memopt.deepspeed_config(
            spec, micro_batch=BATCH // int(os.environ["WORLD_SIZE"]), accumulate=2, offload=True, max_norm=MAX_NORM
        )
        return {
            "deepspeed_plugin": accelerate.DeepSpeedPlugin(hf_ds_config=config),
            "kwargs_handlers": [accelerate.InitProcessGroupKwargs(backend="gloo")],
        }
    state = accelerate.PartialState(backend="gloo")
    if kind == "fsdp2":
        _as_on_cards(state)
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Linear"]
        )
        return {"gradient_accumulation_steps": 2, "fsdp_plugin": plugin}
    state._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    return {"gradient_accumulation_steps": 2}


def under_accelerate(spec: str, path: str, kind: str) -> dict[str, Any]:
    """Accumulation, clipping, save_state and load_state in the middle; the losses, and those after loading."""
    os.environ.update(ACCELERATE_TORCH_DEVICE="cpu", LOCAL_RANK=os.environ["RANK"])
    import accelerate

    from memopt.integrations.deepspeed import check_engine

    accelerator = accelerate.Accelerator(**_accelerator(kind, spec))
    model = net()
    whole = memopt.parse(spec).replace(partition="none")  # DeepSpeed shards by itself
    optimizer = memopt.create(model, whole if kind == "deepspeed" else spec, lr=LR)
    model, prepared = accelerator.prepare(model, optimizer)
    if kind == "deepspeed":
        check_engine(prepared)

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


#: For accelerate, as TrainingArguments hand it on.
FSDP2 = {"version": 2, "transformer_layer_cls_to_wrap": ["Linear"]}


def _as_on_cards(state: Any) -> None:
    """accelerate shards no processes that are of CPUs alone."""
    from accelerate.utils import DistributedType

    state._shared_state["distributed_type"] = DistributedType.MULTI_GPU


class WithLoss(Net):
    """As Trainer calls a model."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"loss": super().forward(x).square().mean()}


def under_trainer(spec: str, path: str, fsdp: bool = False) -> dict[str, Any]:
    """transformers' Trainer: accumulation, clipping, a checkpoint in the middle and training on from it; with ``fsdp``
    sharded by accelerate's FSDP2."""
    os.environ.update(LOCAL_RANK=os.environ["RANK"], MASTER_ADDR="localhost", MASTER_PORT="29511")
    world = int(os.environ["WORLD_SIZE"])
    import transformers

    from memopt.integrations.transformers import consolidate_callback

    rows = torch.cat([torch.randn(BATCH, 67, generator=torch.Generator().manual_seed(i)) for i in range(STEPS)])

    class Recording(transformers.Trainer):
        def compute_loss(self, *args: Any, **keywords: Any) -> Any:
            loss = super().compute_loss(*args, **keywords)
            losses.append(loss.item())
            return loss

    def train(**keywords: Any) -> transformers.Trainer:
        torch.manual_seed(0)
        arguments = transformers.TrainingArguments(
            path,
            max_steps=STEPS // 2,
            save_steps=SAVED_AT // 2,
            per_device_train_batch_size=BATCH // world,
            gradient_accumulation_steps=2,
            max_grad_norm=MAX_NORM,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            ddp_backend="gloo",
            **({"fsdp": True, "fsdp_config": FSDP2} if fsdp else {}),
        )
        if fsdp:
            _as_on_cards(arguments.distributed_state)
        trainer = Recording(
            WithLoss(),
            arguments,
            train_dataset=[{"x": row} for row in rows],
            optimizer_cls_and_kwargs=(memopt.Optimizer, {"spec": spec, "lr": LR}),
            callbacks=[consolidate_callback()],
        )
        trainer.train(**keywords)
        return trainer

    losses: list[float] = []
    try:
        train()
    except RuntimeError as error:
        torch.distributed.destroy_process_group()  # as a process that ends does: only the first rank saves
        return {"refused": str(error)}
    found = {"losses": losses.copy()}
    losses.clear()
    train(resume_from_checkpoint=f"{path}/checkpoint-{SAVED_AT // 2}")
    return {**found, "resumed": losses}


def under_deepspeed(spec: str, path: str, stage: int, offload: bool) -> dict[str, Any]:
    """DeepSpeed by itself: a checkpoint in the middle, and training on from it in another engine."""
    from memopt.integrations.deepspeed import check_engine

    deepspeed = deepspeed_on_gloo()

    def started() -> Any:
        model = net()
        config = memopt.deepspeed_config(
            f"adamw/zero{stage}", micro_batch=BATCH // 2, accumulate=2, offload=offload, max_norm=MAX_NORM
        )
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
                engine.save_checkpoint(path, tag="middle")
        return losses

    try:
        losses = steps(started(), 0)
    except RuntimeError as error:
        return {"refused": str(error)}
    again = started()
    again.load_checkpoint(path, tag="middle")
    return {"losses": losses, "resumed": steps(again, SAVED_AT)}
