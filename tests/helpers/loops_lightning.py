"""The script of :mod:`tests.helpers.loops` under Lightning."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

import memopt
from tests.helpers.loops import LR, MAX_NORM, SAVED_AT, STEPS, data, net


def under_lightning(spec: str, path: str) -> dict[str, Any]:
    """Lightning: accumulation, clipping, a checkpoint in the middle and training on from it."""
    import logging

    from lightning import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    os.environ.update(LOCAL_RANK=os.environ["RANK"], NODE_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="29512")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    world, batches = int(os.environ["WORLD_SIZE"]), [data(i) for i in range(STEPS)]

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss = self.net(batches[index]).square().mean()  # loaders begin anew when training goes on
            losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return memopt.create(self, spec, lr=LR)

    def train(resume: str | None = None) -> None:
        trainer = Trainer(
            accelerator="cpu",
            devices=world,
            strategy="ddp" if world > 1 else "auto",
            max_steps=STEPS // 2,
            accumulate_grad_batches=2,
            gradient_clip_val=MAX_NORM,
            default_root_dir=path,
            logger=False,
            callbacks=[ModelCheckpoint(path, "{step}", every_n_train_steps=SAVED_AT // 2, save_top_k=-1)],
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(Module(), torch.utils.data.DataLoader(batches, batch_size=None), ckpt_path=resume)

    losses: list[float] = []
    try:
        train()
    except RuntimeError as error:
        return {"refused": str(error)}
    found = {"losses": losses.copy()}
    losses.clear()
    train(f"{path}/step={SAVED_AT // 2}.ckpt")
    return {**found, "resumed": losses}
