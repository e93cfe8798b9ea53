"""ZeRO-3: parameters, gradients and state sharded."""

from __future__ import annotations

from typing import final

from memopt.partitions.fsdp import Sharded


@final
class Zero3(Sharded):
    """FSDP2 with ``reshard_after_forward=True``: see :func:`memopt.shard`.

    Source: Rajbhandari et al., "ZeRO", SC 2020 (P_os+g+p).
    """

    name = "zero3"
    summary = "weights, gradients and state cut by rows; a block whole while it computes (FSDP2)"
    reshard_after_forward = True
