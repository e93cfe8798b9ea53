"""Hooks with which a placement's store sees gradients as they become ready."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol, final

import torch
from torch import Tensor

from memopt.partitions.dtensor import is_dtensor


class Taker(Protocol):
    def take_new(self, name: str, p: Tensor) -> None:
        """The gradient of ``p`` is ready, in the middle of ``backward()``."""


@final
class Hooks:
    """Post-accumulate-grad hooks on some parameters, for a taker that they do not keep alive: a hook is kept by the
    parameter, which the optimizer keeps, and no collector sees through that."""

    def __init__(self, taker: Taker) -> None:
        self._taker = weakref.ref(taker)
        self._hooks: dict[str, tuple[Tensor, Any]] = {}

    def on(self, parameters: Mapping[str, Tensor]) -> None:
        """See the gradients of these parameters from now on, and of no others."""
        for name in [n for n, (p, _) in self._hooks.items() if parameters.get(n) is not p]:
            self._hooks.pop(name)[1].remove()
        for name, p in parameters.items():
            if name not in self._hooks and p.requires_grad:
                self._hooks[name] = p, p.register_post_accumulate_grad_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        of = self._taker

        def arrived(p: Tensor) -> None:
            taker = of()
            if taker is not None:
                with torch.no_grad():
                    taker.take_new(name, p)

        return arrived


def ranks() -> int:
    """How many processes train together."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def averaged(p: Tensor) -> bool:
    """Whether a gradient of ``p`` that is ready is that of all ranks: the hooks of fully_shard's parameters are called
    with the reduced shard, those of DistributedDataParallel's with what this rank alone has."""
    return ranks() == 1 or is_dtensor(p)


def leave(g: Tensor) -> None:
    """Its memory may be used again when this stream, which has just been given a copy of it, has come so far."""
    if g.is_cuda:
        g.record_stream(torch.cuda.current_stream(g.device))
