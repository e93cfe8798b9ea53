"""Start a run's processes, listen to them, and leave none behind."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory

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
    ranks: list[Rank] = []
    with TemporaryDirectory(prefix="memopt-train-") as folder:
        try:
            for number in range(job.world_size):
                ranks.append(Rank.start(job, number, folder))
            return Result(job, predicted, _listen(ranks, job, on_step))
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.join()


@dataclass
class Rank:
    """A process, the pipe through which it speaks, and what it has said so far."""

    number: int
    process: SpawnProcess
    pipe: Connection
    log: Path
    result: RankResult | None = None
    failure: str = ""

    @classmethod
    def start(cls, job: Job, number: int, folder: str) -> Rank:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        log = Path(folder, f"stderr.{number}")
        process = context.Process(target=work, args=(job, number, folder, str(log), theirs), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        return cls(number, process, ours, log)

    @property
    def pending(self) -> bool:
        return self.result is None and not self.failure

    def hear(self) -> tuple[int, float] | None:
        """Take one message: a step and its loss are returned, a result or a failure is kept."""
        try:
            kind, value = self.pipe.recv()
        except (EOFError, OSError):
            kind, value = "error", self._last_words()
        if kind == "step":
            step, loss = value
            return step, loss
        if kind == "result":
            self.result = value
        else:
            self.failure = value
        return None

    def _last_words(self) -> str:
        self.process.join(GRACE_S)
        code = self.process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return "\n  ".join([f"the process {how} before it had a result", *lines[-SHOWN_LINES:]])


def _listen(ranks: Sequence[Rank], job: Job, on_step: OnStep) -> tuple[RankResult, ...]:
    step = 0
    patience = _patience(job, step)
    while pending := {rank.pipe: rank for rank in ranks if rank.pending}:
        heard = wait(list(pending), patience)
        if not heard:
            break
        for rank in (rank for pipe, rank in pending.items() if pipe in heard):
            taken = rank.hear()
            if taken:
                step = taken[0]
                on_step(*taken)
        patience = GRACE_S if any(rank.failure for rank in ranks) else _patience(job, step)
    failed = [f"rank {rank.number}: {rank.failure}" for rank in ranks if rank.failure]
    if failed:
        raise RunFailed("; ".join(failed).removeprefix("rank 0: " if len(ranks) == 1 else ""))
    results = [rank.result for rank in ranks if rank.result]
    if len(results) < len(ranks):
        raise RunFailed(f"after step {step}, nothing was heard for {patience:g} seconds, so the run was ended")
    return tuple(results)


def _patience(job: Job, step: int) -> float:
    """Seconds to wait for the next message after a step."""
    return job.timeout if 0 < step < job.steps else max(job.timeout, UNTIMED_S)
