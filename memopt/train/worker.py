"""The first thing that happens in a rank's process. Imports torch only after its noise has somewhere to go."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection

from memopt.train.job import Job, RankResult

#: Errors of these kinds are written for the person at the keyboard; of any other the trace is wanted.
FOR_PEOPLE = (ValueError, OSError, ImportError, RuntimeError, MemoryError)
#: Who started the ranks loses patience before a rank that waits for another does: it knows which of them is silent.
LONGER = timedelta(minutes=2)


def work(job: Job, rank: int, folder: str, log: str, pipe: Connection) -> None:
    """Run one rank and send ``("step", (step, loss))``, then ``("result", RankResult)`` or ``("error", text)``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    with open(log, "w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    # Threads that wait for each other sleep instead of spinning: on a machine that does other things too, a spinning
    # thread takes the core from the one it waits for, and a step takes several times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        pipe.send(("result", _train(job, rank, folder, pipe)))
    except BrokenPipeError:
        sys.exit(1)  # nobody is listening any more
    except FOR_PEOPLE as error:
        pipe.send(("error", str(error) or type(error).__name__))
    except Exception:
        pipe.send(("error", traceback.format_exc()))


def _train(job: Job, rank: int, folder: str, pipe: Connection) -> RankResult:
    from memopt.train.run import train

    def on_step(step: int, loss: float) -> None:
        if rank == 0:
            pipe.send(("step", (step, loss)))

    if job.world_size == 1:
        return train(job, rank, on_step)
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=job.world_size,
        timeout=timedelta(seconds=job.timeout) + LONGER,
    )
    try:
        return train(job, rank, on_step)
    finally:
        dist.destroy_process_group()


def _loopback() -> str:
    """The interface that leads to this machine only, where all ranks are. Otherwise gloo looks up the host's name,
    which fails on machines without a network."""
    import psutil

    return next(
        (name for name, addresses in psutil.net_if_addrs().items() if any(a.address == "127.0.0.1" for a in addresses)),
        "lo",
    )
