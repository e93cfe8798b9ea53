"""How far the runs are: bars on a terminal, a line now and then where nobody watches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Protocol, final

from rich import console as rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

#: Lines per run where the output is not a terminal, after that of the first step.
LINES = 5
#: Columns of what a bar says beside its progress.
SAID = len("loss 00.000")


class Console(rich.Console):
    """One whose reader may go: the command line then ends as every verb does, and not with an exit code of rich's."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Observer(Protocol):
    """What is told of the runs, which are counted from 0 and follow each other."""

    def begin(self, run: int) -> None: ...
    def step(self, run: int, step: int, loss: float) -> None: ...
    def end(self, run: int, outcome: str) -> None: ...


@contextmanager
def progress(console: Console, specs: Sequence[str], steps: int) -> Iterator[Observer]:
    """Bars if the console is a terminal, lines otherwise."""
    if not console.is_terminal:
        yield Lines(console, specs, steps)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, expand=True) as bars:
        yield Bars(bars, [bars.add_task(spec, total=steps, start=False, said=" " * SAID) for spec in specs], steps)


@final
class Bars:
    """One bar for each run, all of them in view from the beginning."""

    def __init__(self, bars: Progress, tasks: Sequence[TaskID], steps: int) -> None:
        self._bars, self._tasks, self._steps = bars, tasks, steps

    def _say(self, run: int, text: str) -> None:
        self._bars.update(self._tasks[run], said=f"{text:<{SAID}}")

    def begin(self, run: int) -> None:
        self._bars.start_task(self._tasks[run])
        self._say(run, "starting")

    def step(self, run: int, step: int, loss: float) -> None:
        self._bars.update(self._tasks[run], completed=step)
        self._say(run, f"loss {loss:.3f}" if step < self._steps else "validating")

    def end(self, run: int, outcome: str) -> None:
        self._say(run, outcome)
        self._bars.stop_task(self._tasks[run])


@final
class Lines:
    """A line for the first step, then for every fifth of a run."""

    def __init__(self, console: Console, specs: Sequence[str], steps: int) -> None:
        self._console, self._specs, self._steps = console, specs, steps
        self._width = max(map(len, specs))
        self._began = 0.0

    def begin(self, run: int) -> None:
        self._began = monotonic()

    def step(self, run: int, step: int, loss: float) -> None:
        if step in (1, self._steps) or step % max(self._steps // LINES, 1) == 0:
            self._say(run, f"step {step}/{self._steps}  loss {loss:.3f}")

    def end(self, run: int, outcome: str) -> None:
        self._say(run, outcome)

    def _say(self, run: int, text: str) -> None:
        seconds = f"{monotonic() - self._began:.0f} s"
        self._console.print(f"{self._specs[run]:<{self._width}}  {seconds:>5}  {text}", highlight=False)
