"""ZeRO-2: gradients and state sharded; parameters gathered from the forward pass to the end of the backward pass."""

from __future__ import annotations

from typing import final

from memopt.partitions.fsdp import Sharded


@final
class Zero2(Sharded):
    """FSDP2 with ``reshard_after_forward=False``: see :func:`memopt.shard`. Between steps parameters are sharded too.

    Source: Rajbhandari et al., "ZeRO", SC 2020 (P_os+g).
    """

    name = "zero2"
    summary = "weights, gradients and state cut by rows; weights whole during a step (FSDP2)"
    reshard_after_forward = False
