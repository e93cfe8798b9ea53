"""What the tests of sharded state share: a model of uneven rows, its gradients, and how one drives the other."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

import memopt
from tests.helpers.cases import HYPER

#: Of Uneven, what FSDP cuts within a block: it stays in 32 bits there.
CUT_WITHIN = {"long": "32bit", "narrow": "32bit"}


class Uneven(nn.Module):
    """Rows that no number of ranks divides, fewer rows than ranks, vectors cut within a block, a stack of matrices,
    rows of which several share a block."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Parameter(torch.randn(255, 67))
        self.odder = nn.Parameter(torch.randn(257, 130))
        self.few = nn.Parameter(torch.randn(2, 2100))
        self.long = nn.Parameter(torch.randn(4097))
        self.short = nn.Parameter(torch.randn(5))
        self.stack = nn.Parameter(torch.randn(3, 129, 65))
        self.narrow = nn.Parameter(torch.randn(515, 9))


def uneven_model(dtype: torch.dtype = torch.float32) -> Uneven:
    torch.manual_seed(0)
    return Uneven().to(dtype)


def build(spec: str, model: nn.Module | None = None, **keywords: Any) -> tuple[nn.Module, memopt.Optimizer]:
    """The model, sharded if the spec says so, and its optimizer."""
    model = uneven_model() if model is None else model
    parsed = memopt.parse(spec)
    if parsed.partition in ("zero2", "zero3"):
        memopt.shard(model, spec)
    return model, memopt.create(model, spec, **HYPER.get(parsed.rule, {}), **keywords)


def reference(spec: str, partition: str = "none") -> tuple[nn.Module, memopt.Optimizer]:
    """One process; vectors and narrow rows stay in 32 bits where the partition of ``spec`` cuts within their blocks.
    With ``partition="zero1"`` sums are taken as several ranks take them."""
    parsed = memopt.parse(spec)
    cuts = parsed.partition in ("zero2", "zero3") and parsed.format != "32bit"
    return build(str(parsed.replace(partition=partition)), overrides=CUT_WITHIN if cuts else {})


def drive(model: nn.Module, optimizer: memopt.Optimizer, first: int, steps: int) -> None:
    """Steps on random gradients that do not depend on the parameters, so that no difference is amplified."""
    for step in range(first, first + steps):
        g = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = as_sharded(torch.randn(p.shape, generator=g).to(p.dtype), p)
        optimizer.step()


def as_sharded(x: Tensor, p: Any) -> Tensor:
    """``x``, the same on every rank, cut as ``p`` is."""
    from memopt.partitions.dtensor import is_dtensor

    if not is_dtensor(p):
        return x
    from torch.distributed.tensor import distribute_tensor

    # All ranks have the same x. Before torch 2.7 it is sent round all the same.
    alone = {"src_data_rank": None} if "src_data_rank" in signature(distribute_tensor).parameters else {}
    return distribute_tensor(x, p.device_mesh, p.placements, **alone)


def whole(p: Any) -> Tensor:
    """All rows of a parameter or a part of its state, on every rank."""
    if p.dtype == torch.float8_e4m3fn and hasattr(p, "full_tensor"):  # gloo knows no 8-bit floats
        from memopt.partitions.dtensor import like

        bits = like(p, p.to_local().view(torch.uint8), tuple(p.shape), replicated=False)
        return bits.full_tensor().view(p.dtype)
    return p.full_tensor().detach() if hasattr(p, "full_tensor") else p.detach().clone()
