"""Run a function in several processes of one gloo group and collect what they return.

Ranks are forked from a process that has only imported (``PRELOADED``) and never computed: starting Python and importing
torch took most of the time of most of these tests.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=120)
FSDP_ON_CPU = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 7)
PRELOADED = ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "memopt.optim.optimizer"]
NO_FSDP = "FSDP2 of torch 2.6 does not run on a CPU"


def _rank(
    rank: int,
    world: int,
    directory: str,
    environment: dict[str, str],
    module: str,
    function: str,
    arguments: tuple[Any, ...],
) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    torch.set_num_threads(1)
    os.environ.clear()  # the process that it was forked from may be older than the test's environment
    os.environ.update(environment, RANK=str(rank), WORLD_SIZE=str(world))
    store = dist.FileStore(f"{directory}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    result = getattr(import_module(module), function)(*arguments)
    torch.save(result, f"{directory}/{rank}.pt")
    with suppress(RuntimeError, ValueError):  # a rank that was to fail may have gone
        dist.barrier()
    # Without the interpreter's end: whoever still holds a process group (DDP, a device mesh) takes gloo's threads into
    # it, which abort the process now and then.
    os._exit(0)


def run(function: Any, world: int, *arguments: Any) -> list[Any]:
    """``function(*arguments)`` of a test module in each of ``world`` processes; the results by rank."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as directory:
        try:
            mp.start_processes(
                _rank,
                (world, directory, dict(os.environ), function.__module__, function.__name__, arguments),
                nprocs=world,
                start_method="forkserver",
            )
        except mp.ProcessRaisedException as error:
            if not FSDP_ON_CPU and "'Stream' object has no attribute 'record_event'" in str(error):
                pytest.skip(NO_FSDP)
            raise
        return [torch.load(f"{directory}/{rank}.pt", weights_only=False) for rank in range(world)]


def deepspeed_on_gloo() -> Any:
    """DeepSpeed for this rank, whose sums are gloo's: those of its own would be compiled first, a minute's work."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=os.environ["RANK"], LOCAL_SIZE=os.environ["WORLD_SIZE"])
    import deepspeed

    import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    return deepspeed


def once(function: Any) -> Any:
    """``function``, run once for the same arguments; what it raised is raised again."""
    done: dict[Any, Any] = {}

    def call(*arguments: Any) -> Any:
        if arguments not in done:
            try:
                done[arguments] = function(*arguments)
            except (Exception, pytest.skip.Exception) as error:
                done[arguments] = error
        if isinstance(done[arguments], BaseException):
            raise done[arguments]
        return done[arguments]

    return call
