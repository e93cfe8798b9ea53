"""What a placement is, and the placement's store it gives the state of one optimizer: where parts are allocated, and
the chunk that
brings them to where the step runs and writes them back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from memopt.core.ledger import Line
from memopt.layout.chunks import ChunkedState, StoreOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from memopt.kernels import Streaming
    from memopt.layout.param_step import Work
    from memopt.placements.stores.durable_directory import Directory

#: ``run(works)`` executes the step of these works, whose state lies where the parameter is (for ``cpu``: on the host).
StepFunction = Callable[[Sequence["Work"]], None]
E = TypeVar("E")
#: Of one parameter: its state without ``step``, and how often it has stepped.
Restored = tuple[dict[str, "Tensor"], float]


class Placement(ABC):
    """A value on the placement axis; torch-free but for :meth:`home`. Subclasses are final."""

    name: ClassVar[str]
    summary: ClassVar[str]
    #: Whether state is in host memory, or mapped into it, wherever the parameter is; and whether the step runs there.
    keeps_on_host: ClassVar[bool] = False
    steps_on_host: ClassVar[bool] = False

    @abstractmethod
    def location(self, device: str) -> str:
        """What the ledger says of state whose parameter is on ``device``."""

    @abstractmethod
    def placement_store(self, store_options: StoreOptions) -> PlacementStore:
        """A placement's store for one optimizer's state."""

    def workspace(self, chunked: Sequence[ChunkedState], device: str, options: Mapping[str, Any]) -> list[Line]:
        """What is allocated besides the state while these parameters on ``device`` are stepped, and stays."""
        return []


class PlacementStore:
    """Where an optimizer keeps the state of one placement. This one: memory, and stepped as it lies."""

    #: Whether state that exists may be overwritten where it lies. Else it is allocated anew and :meth:`commit` follows.
    rewritable = True
    #: Whether it may be made again from a pickle or a copy of the optimizer.
    copyable = True

    #: Whether :meth:`register_params` does anything.
    takes_params = False
    #: Whether :meth:`holds` looks at anything.
    knows_states = False
    #: Whether :meth:`preallocate` does anything.
    preallocates = False
    #: Whether :meth:`streaming` may give an answer.
    streams_alike = False

    def __init__(self, placement: Placement) -> None:
        self.placement = placement

    def in_place(self, device: torch.device) -> bool:
        """Whether the step reads and writes the state where ``optimizer.state`` says it is, and that is all."""
        return True

    def streaming(self, works: Sequence[Work], chunked: Callable[[Work], ChunkedState]) -> Streaming | None:
        """How these works are stepped where that is the same in every step; None where it is not."""
        return None

    def allocate(self, name: str, lines: Sequence[Line], device: torch.device) -> dict[str, Tensor]:
        """Zeroed tensors for these lines of one parameter: state key -> tensor."""
        import torch

        from memopt.kernels.huge_pages import zeros

        return {line.key: zeros(line.shape, getattr(torch, line.dtype), device) for line in lines}

    def preallocate(self, wanted: Sequence[tuple[str, Sequence[Line]]]) -> None:
        """:meth:`allocate` is called next for these names and lines, so that room may be taken for all together; what
        was taken before and nobody needed is given back."""

    def holds(self, name: str, state: Mapping[str, Tensor]) -> bool:
        """Whether these tensors are what this store knows as the state of the parameter, if it knows parameters."""
        return True

    def restore(self, name: str, lines: Sequence[Line]) -> Restored | None:
        """The state of this parameter that an earlier process left, once."""
        return None

    def validate_existing(self, lines: Callable[[], Mapping[str, Sequence[Line]]]) -> None:
        """Raise ValueError if what an earlier process left is not of these parameters: name -> lines without step."""

    @property
    def durable(self) -> Directory | None:
        """What is kept beyond this process, where it is."""
        return None

    def check(self) -> None:
        """Raise, before a step changes anything, if the state cannot be reached any more."""

    def step(self, works: Sequence[Work], run: StepFunction, chunked: Callable[[Work], ChunkedState]) -> None:
        """Bring the state of these works to where they are stepped, ``run`` them, write it back."""
        run(works)

    def prepare(self, chunked: Mapping[str, ChunkedState], device: torch.device, also: bool = False) -> None:
        """These parameters on ``device`` have state (``also``: besides those of before): allocate what their step will
        need besides."""

    def register_params(self, parameters: Mapping[str, tuple[Tensor, ChunkedState, bool]]) -> None:
        """These are the parameters, with what their state will be; the gradients of those with True stand in ``p.grad``
        until the step, and may be taken or copied in ``backward()``."""

    def prefetch_grad(self, name: str, p: Tensor) -> None:
        """Begin to bring the gradient to where the step will read it, if it is not there."""

    def submit_step(self, name: str, p: Tensor, entry: E, step: Callable[[list[tuple[E, Tensor]]], None]) -> bool:
        """Have ``step`` called, beside ``backward()``, with the gradient of ``p`` when it is where the step reads it:
        with ``entry`` and the gradient, and with those that have come meanwhile. False where nothing runs beside it:
        then nothing was done. ``step`` runs in another thread, where ``p.grad`` must not be looked at."""
        return False

    def synchronize(self) -> None:
        """Wait for all that :meth:`submit_step` began; raise the first error there was."""

    def abandon(self) -> None:
        """A step was interrupted, and its state is about to be replaced: wait until nothing of it is under way."""
        with suppress(Exception):  # what it met is no matter any more
            self.synchronize()

    def commit(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Everything that is to survive now: parameter -> state."""

    def workspace(self) -> list[Line]:
        """The lines of what is allocated besides the state."""
        return []

    def tensors(self) -> list[Tensor]:
        """The tensors of these lines, where they are tensors."""
        return []

    def explain(self, device: torch.device) -> str:
        """One sentence: by what mechanism the state is kept here."""
        return f"state is in the memory of {device}"

    def close(self, empty: bool = False) -> None:
        """Give back threads, locks and files; ``empty`` if the state has moved elsewhere."""
