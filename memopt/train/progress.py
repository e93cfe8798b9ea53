"""How far the runs are: bars on a terminal, a line now and then where nobody watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

#: Lines per run where the output is not a terminal.
LINES = 5

#: Called with the number of the run, its step and its loss.
Observe = Callable[[int, int, float], None]


@contextmanager
def progress(console: Console, specs: Sequence[str], steps: int) -> Iterator[Observe]:
    """Something to call after each step of each run."""
    if not console.is_terminal:
        yield _lines(console, specs, steps)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, expand=True) as bars:
        tasks = [bars.add_task(spec, total=steps, start=False, loss=" " * len("loss 0.000")) for spec in specs]

        def observe(run: int, step: int, loss: float) -> None:
            bars.start_task(tasks[run])
            bars.update(tasks[run], completed=step, loss=f"loss {loss:.3f}")

        yield observe


def _lines(console: Console, specs: Sequence[str], steps: int) -> Observe:
    width = max(map(len, specs))
    started: dict[int, float] = {}

    def observe(run: int, step: int, loss: float) -> None:
        started.setdefault(run, monotonic())
        if step == steps or step % max(steps // LINES, 1) == 0:
            seconds = monotonic() - started[run]
            line = f"{specs[run]:<{width}}  step {step}/{steps}  loss {loss:.3f}  {seconds:.0f} s"
            console.print(line, highlight=False)

    return observe
