"""What the optimizer and its cached step tell each other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from memopt.core.integrity import Integrity
    from memopt.kernels.huge_pages import Pages
    from memopt.layout.param_step import Work
    from memopt.partitions import Partition
    from memopt.rules import Rule
    from memopt.spec import OptimSpec


class StepContext(NamedTuple):
    """What a cached step is told of the optimizer: what it must be as it was, and what is new at every step."""

    spec: OptimSpec
    partition: Partition
    groups: Sequence[dict[str, Any]]
    state: Mapping[Any, Any]
    seed: int
    nonfinite: str
    capturable: bool
    integrity: Integrity
    found_inf: Tensor | None = None  # torch.amp.GradScaler's
    grad_scale: Tensor | None = None
    bounds: Sequence[float | None] | None = None  # of each group, of the norm of all gradients; None: nobody has any


class StepOutcome(NamedTuple):
    """What became of a step that kernels took beside the host: how many were ``skipped``, and the ``names`` of
    parameters whose gradient was the reason, if it was a gradient."""

    skipped: int
    names: list[str]


class Streaming(NamedTuple):
    """A step of state that is brought to it in chunks, as long as it is cut in the same way. ``chunks`` are the works
    of each, rows of parameters with their state in a buffer; ``run(step, wanted)`` brings those that are wanted one
    after the other, calls ``step(i)`` for chunk i and writes it back; ``same()`` says whether buffers and state are
    still where they were, and raises OSError where the state cannot be reached any more. ``moves``: ``run`` leaves
    other tensors in the state, of the same kinds."""

    chunks: Sequence[Sequence[Work]]
    run: Callable[[Callable[[int], None], Collection[int]], None]
    same: Callable[[], bool]
    moves: bool = False


class Stores(Protocol):
    """What a plan asks of the stores of the state."""

    @property
    def streams_alike(self) -> bool: ...  # whether any may stream in the same way in every step

    def in_place(self, name: str, device: torch.device) -> bool: ...  # whether its state is stepped where it lies
    def streaming(self, works: Sequence[Work]) -> Streaming | None: ...  # of works whose state is not; None: not alike


class CachedStep(Protocol):
    """A whole optimizer's step, prepared once and repeated while nothing but the gradients changes."""

    #: Whether NaN and Inf, torch.amp.GradScaler's numbers and the norm of the gradients are looked at on the device.
    on_device: bool
    #: That of the gradients, where the device finds it.
    norm: Tensor | None
    #: Those that step this time.
    parameters: list[Tensor]
    #: Whether a CUDA graph has recorded it, which reads its tables from now on.
    recorded: bool

    @property
    def pages(self) -> Pages | None: ...  # large ones, under what it steps on the CPU
    def check_recording(self) -> None: ...  # raises RuntimeError where it cannot be part of the graph that is captured
    def refresh(self, context: StepContext) -> bool: ...
    def look(self, summed: bool) -> tuple[list[str], list[float]]: ...  # names of what is not finite; sums of squares
    def step(self, scales: Sequence[float]) -> list[str]: ...  # of each group, unless the device finds them
    def reported(self) -> Sequence[tuple[Rule, Tensor, list[float]]]: ...  # by parameters of this step
    def synchronize(self) -> StepOutcome | None: ...
    def skipped_on_device(self) -> int: ...
