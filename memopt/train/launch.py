"""Start a run's processes, listen to them, and leave none behind."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

from memopt.train.job import Job, RankResult, Result
from memopt.train.worker import work

#: When a rank fails its peers notice soon, and which of them failed first is seen only when all have been heard.
GRACE_S = 2.0
#: Before the first step torch is loaded and the ranks meet, after the last comes validation: at least this long.
UNTIMED_S = 120.0
#: Lines of a dead rank's standard error that are shown.
SHOWN_LINES = 5

OnStep = Callable[[int, float], None]


class RunFailed(Exception):
    """A run ended without a result; the message says which rank and why."""


def launch(job: Job, on_step: OnStep) -> Result:
    """Price the state, then run the job in processes of its own, one for each rank.

    Raises :class:`RunFailed` when a rank dies, reports an error, or when no step ends in ``job.timeout`` seconds;
    the other ranks are ended then.
    """
    from memopt.train.run import predict

    predicted = predict(job)
    context = multiprocessing.get_context("spawn")
    ranks: dict[Connection, SpawnProcess] = {}
    with TemporaryDirectory(prefix="memopt-train-") as folder:
        try:
            for rank in range(job.world_size):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=work, args=(job, rank, folder, theirs), daemon=True)
                process.start()
                theirs.close()  # so that the end of the process is the end of the pipe
                ranks[ours] = process
            return Result(job, predicted, _listen(ranks, job, folder, on_step))
        finally:
            for process in ranks.values():
                process.kill()
                process.join()


def _listen(ranks: Mapping[Connection, SpawnProcess], job: Job, folder: str, on_step: OnStep) -> tuple[RankResult, ...]:
    number = {pipe: rank for rank, pipe in enumerate(ranks)}
    results: dict[int, RankResult] = {}
    failures: dict[int, str] = {}
    step, patience = 0, max(job.timeout, UNTIMED_S)
    deadline = monotonic() + patience
    while len(results) + len(failures) < len(ranks):
        pending = [pipe for pipe, rank in number.items() if rank not in results and rank not in failures]
        heard = wait(pending, max(deadline - monotonic(), 0))
        if not heard:
            break
        for pipe in heard:
            assert isinstance(pipe, Connection)
            rank = number[pipe]
            try:
                kind, value = pipe.recv()
            except (EOFError, OSError):
                kind, value = "death", _last_words(ranks[pipe], Path(folder, f"stderr.{rank}"))
            if kind == "step":
                step = value[0]
                on_step(*value)
            elif kind == "result":
                results[rank] = value
            else:
                failures[rank] = value
        patience = GRACE_S if failures else job.timeout if 0 < step < job.steps else max(job.timeout, UNTIMED_S)
        deadline = monotonic() + patience
    if failures:
        raise RunFailed("; ".join(_who(job, rank) + text for rank, text in sorted(failures.items())))
    if len(results) < len(ranks):
        raise RunFailed(f"after step {step}, nothing was heard for {patience:g} seconds, so the run was ended")
    return tuple(results[rank] for rank in range(job.world_size))


def _who(job: Job, rank: int) -> str:
    return f"rank {rank}: " if job.world_size > 1 else ""


def _last_words(process: SpawnProcess, log: Path) -> str:
    process.join(GRACE_S)
    code = process.exitcode or 0
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return "\n  ".join([f"the process {how} before it had a result", *lines[-SHOWN_LINES:]])
