"""The ranks of a sharded spec."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: The process groups over which a parameter's rows are cut, in the order in which sums are taken; none: all are here.
ProcessGroups = tuple[Any, ...]


@contextmanager
def answered(what: str) -> Iterator[None]:
    """Around collectives: a rank that ended or does not answer within the group's timeout becomes one sentence."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RuntimeError(
            f"another rank has ended or does not answer, in the middle of {what}; what is here is unfinished: end all "
            f"ranks and load the last checkpoint ({reason})"
        ) from error


def is_distributed() -> bool:
    """Whether there are other ranks."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def membership(partition: str, group: Any) -> tuple[int, int]:
    """This process's rank in ``group`` (all of torch.distributed's by default) and its size; without
    ``torch.distributed`` a world of one.

    Raises RuntimeError for one of several processes without a process group, ValueError for a group that this process
    is not in.
    """
    import torch.distributed as dist

    ready = dist.is_available() and dist.is_initialized()
    launched = int(os.environ.get("WORLD_SIZE", "1") or 1)
    if not ready and (launched > 1 or group is not None):
        raise RuntimeError(
            f"{partition}: this is one of {launched} processes but no process group exists; call "
            "torch.distributed.init_process_group() before memopt.create()"
        )
    if not ready:
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"{partition}: this process is not a member of the process_group given")
    return rank, dist.get_world_size(group)
