"""What is said before and after the runs: the setting, one table, and what its figures are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table

from memopt.train.job import Job, Result
from memopt.train.text import Text

MIB = 2**20


def setting(text: Text, job: Job) -> str:
    """The text, the model and the schedule, in two lines."""
    from memopt.train.run import shapes

    parameters = sum(p.numel() for p in shapes(job.model).parameters())
    return (
        f"text   {text.name}: {len(text.content):,} bytes, unigram entropy {text.entropy:.3f} nats\n"
        f"model  {parameters:,} parameters, {job.steps} steps of {job.batch} × {job.model.context} bytes, "
        f"seed {job.seed}"
    )


def table(results: Sequence[Result]) -> Table:
    """One row for each run; 60 columns hold the specs people use."""
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    view.add_column("spec", overflow="fold")
    for heading in ("state\nbytes\npredicted", "state\nbytes\nlive", "validation\nloss", "step\nms", "peak\nmem.\nMiB"):
        view.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        view.add_row(
            result.job.spec,
            f"{max(result.predicted):,}",
            f"{max(result.live):,}",
            f"{result.validation_loss:.4f}",
            f"{result.step_s * 1e3:.0f}",
            f"{result.peak_resident / MIB:.0f}",
        )
    return view


def notes(results: Sequence[Result]) -> Iterator[str]:
    """What a reader of the table would ask."""
    base = min(rank.resident_before for result in results for rank in result.ranks)
    yield (
        "Loss in nats per byte, steps at their median. Of the peak memory of each run's own process, "
        f"{base / MIB:.0f} MiB are Python and torch before there is a model."
    )
    shared = [result.job.spec for result in results if result.job.world_size > 1]
    if shared:
        size = max(result.job.world_size for result in results)
        yield f"{', '.join(shared)}: figures of the largest of {size} processes, which share each batch."
    paged = [result.job.spec for result in results if result.job.parsed.placement == "paged"]
    if paged:
        yield f"{', '.join(paged)}: state is resident, and counted, as long as there is room for it."
    for result in results:
        if result.ranks[0].skipped_steps:
            steps = result.ranks[0].skipped_steps
            yield f"{result.job.spec}: {steps} steps had NaN or Inf in their gradients and were skipped."


def to_json(result: Result) -> dict[str, Any]:
    """A record of one run; a loss that is not a number is null, since JSON has no other word for it."""
    job, loss = result.job, result.validation_loss
    return {
        "spec": job.spec,
        "lr": job.lr,
        "hyper": job.hyper,
        "seed": job.seed,
        "steps": job.steps,
        "batch": job.batch,
        "context": job.model.context,
        "world_size": job.world_size,
        "threads_per_rank": result.ranks[0].threads,
        "state_bytes_predicted": list(result.predicted),
        "state_bytes_live": list(result.live),
        "state_storage_bytes": [rank.storage for rank in result.ranks],
        "validation_loss": loss if math.isfinite(loss) else None,
        "step_s": result.step_s,
        "optimizer_step_s": max(rank.optimizer_step_s for rank in result.ranks),
        "peak_resident_bytes": [rank.peak_resident for rank in result.ranks],
        "resident_bytes_before": [rank.resident_before for rank in result.ranks],
        "skipped_steps": result.ranks[0].skipped_steps,
    }
