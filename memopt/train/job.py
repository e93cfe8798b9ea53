"""What one run is asked to do and what it gives back. Torch-free: bad input is refused before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from memopt.spec import OptimSpec, parse
from memopt.untrusted.text import shown

#: Bytes by which one tensor of state may be padded where it is placed.
PADDING = 64


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the language model; by default 1.3 million parameters."""

    context: int = 128
    width: int = 160
    layers: int = 4
    heads: int = 5


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run. ``path`` is None for the built-in text, ``threads`` for what torch would take; ``batch`` and
    ``threads`` are those of all ranks together.

    Raises ValueError for a number that is not allowed and SpecError for a spec that does not exist.
    """

    spec: str
    lr: float
    path: str | None = None
    steps: int = 200
    batch: int = 16
    seed: int = 0
    threads: int | None = None
    world_size: int = 1
    timeout: float = 300.0
    model: ModelConfig = field(default_factory=ModelConfig)
    hyper: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        threads = 1 if self.threads is None else self.threads
        for name, value, least, most in (
            ("steps", self.steps, 1, 10**7),
            ("batch", self.batch, 1, 10**5),
            ("context", self.model.context, 1, 10**5),
            ("threads", threads, 1, 4096),
            ("world size", self.world_size, 1, 1024),
            ("seed", self.seed, 0, 2**63 - 1),
        ):
            if value < least:
                raise ValueError(f"{name} {shown(value)} is not allowed; it must be an integer of at least {least}")
            if value > most:
                raise ValueError(f"{name} {shown(value)} is not allowed; it must be an integer of at most {most:,}")
        if not 0 < self.timeout <= 10**7:
            raise ValueError(
                f"timeout {self.timeout:g} is not allowed; it must be a number of seconds above 0, up to 10,000,000"
            )
        if self.batch % self.world_size:
            raise ValueError(f"{self.spec}: a batch of {self.batch} cannot be cut into {self.world_size} equal parts")
        self.parsed.resolve({"lr": self.lr})

    @property
    def parsed(self) -> OptimSpec:
        return parse(self.spec, hyper=self.hyper)


@dataclass(frozen=True)
class RankResult:
    """What one process measured."""

    live: int  # bytes of the tensors in optimizer.state
    storage: int  # bytes of the distinct storages behind them
    tensors: int
    validation_loss: float  # nats per byte
    step_s: float  # median, the whole of a step
    optimizer_step_s: float  # median, optimizer.step() alone
    resident_before: int  # bytes, before the model exists
    peak_resident: int  # bytes
    threads: int
    skipped_steps: int


@dataclass(frozen=True)
class Result:
    """One run: what was predicted for each rank before it began, and what each rank measured."""

    job: Job
    predicted: tuple[int, ...]
    ranks: tuple[RankResult, ...]

    @property
    def live(self) -> tuple[int, ...]:
        return tuple(rank.live for rank in self.ranks)

    @property
    def validation_loss(self) -> float:
        return self.ranks[0].validation_loss

    @property
    def step_s(self) -> float:
        return max(rank.step_s for rank in self.ranks)

    @property
    def peak_resident(self) -> int:
        return max(rank.peak_resident for rank in self.ranks)

    @property
    def mismatches(self) -> list[str]:
        """One sentence for each rank whose state is not, to the byte, what was predicted."""
        found = []
        for i, (predicted, rank) in enumerate(zip(self.predicted, self.ranks, strict=True)):
            who = f"{self.job.spec}, rank {i}" if len(self.ranks) > 1 else self.job.spec
            if rank.live != predicted:
                found.append(f"{who}: {predicted:,} bytes of state were predicted and {rank.live:,} are there")
            elif not 0 <= rank.storage - rank.live <= PADDING * rank.tensors:
                found.append(f"{who}: {rank.live:,} bytes of state stand in storages of {rank.storage:,} bytes")
        return found
