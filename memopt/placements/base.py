"""What a placement is: where the parts of a state are allocated, and how they come to where the step runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from memopt.ledger import Line

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Placement(ABC):
    """A value on the placement axis. Subclasses are final."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def location(self, device: str) -> str:
        """What the ledger says of state whose parameter is on ``device``."""

    @abstractmethod
    def allocate(self, lines: Sequence[Line], device: torch.device) -> dict[str, Tensor]:
        """Zeroed tensors for these lines of one parameter: state key -> tensor."""

    @abstractmethod
    def explain(self, device: torch.device) -> str:
        """One sentence: by what mechanism the state is kept here."""
