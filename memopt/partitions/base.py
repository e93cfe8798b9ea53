"""What a partition is: which rows of which parameter a rank owns, and how updated rows reach the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from memopt.geometry import Rows, Shape

if TYPE_CHECKING:
    from torch import Tensor


class Partition(ABC):
    """A value on the partition axis. ``rows`` is pure arithmetic, for pricing; the rest needs a process group."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @staticmethod
    @abstractmethod
    def rows(shape: Shape, rank: int, world_size: int) -> Rows:
        """The rows of a parameter of this global shape that ``rank`` of ``world_size`` owns."""

    @property
    @abstractmethod
    def rank(self) -> int: ...

    @property
    @abstractmethod
    def world_size(self) -> int: ...

    @abstractmethod
    def total(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over the ranks."""

    @abstractmethod
    def publish(self, parameters: Iterable[Tensor]) -> None:
        """Bring every rank's updated rows of these parameters to all ranks."""
