"""What an engine is: who lays the state out and who executes the step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from memopt.core.ledger import Line
from memopt.core.rows import Rows

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.formats import Format
    from memopt.layout.param import ParamLayout
    from memopt.layout.param_step import Work
    from memopt.partitions import Partition
    from memopt.rules import Moment
    from memopt.spec import OptimSpec


class Engine(ABC):
    """A value on the engine axis. Subclasses are final; everything but ``step`` is torch-free."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def refuse(self, spec: OptimSpec) -> str | None:
        """Why the engine cannot execute this spec, or None."""

    @abstractmethod
    def refuse_hyper(self, spec: OptimSpec, h: Mapping[str, Any]) -> str | None:
        """Why the engine cannot execute these hyperparameters, or None."""

    @abstractmethod
    def require(self) -> None:
        """Raise ImportError, with the line that installs it, for a package that is missing."""

    @abstractmethod
    def refuse_rows(self, rows: Rows) -> str | None:
        """Why the engine cannot take these rows of a parameter, or None; the parameter's name comes before it."""

    @abstractmethod
    def code_of(self, moment: Moment, asked: str) -> tuple[Moment, Format]:
        """How the engine codes a moment in the format ``asked``: the moment with the sign that its code has, and the
        format."""

    @abstractmethod
    def shared_lines(self, lines: Sequence[Line]) -> Sequence[Line]:
        """Tables that all these lines use together."""

    @abstractmethod
    def step(self, works: Sequence[Work], partition: Partition, seed: int) -> None:
        """Execute one step of these parameters; state and parameters are changed in place. What is given fits its
        layout: :meth:`memopt.layout.param.ParamLayout.check` has been called."""

    @abstractmethod
    def slow_path(self, layout: ParamLayout, p: Tensor, ranks: int, cut_row: bool) -> str | None:
        """Why this parameter is not stepped by the code that :meth:`explain` names, or None. ``ranks`` share it, and
        with ``cut_row`` one of its rows."""

    @abstractmethod
    def explain(self) -> str:
        """One sentence: what code executes the step here."""
