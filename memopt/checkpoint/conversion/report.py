"""What a conversion lost, moment by moment."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import nan, sqrt
from typing import Any

from memopt.spec import OptimSpec


def spelled(spec: OptimSpec) -> str:
    """The spec, and its engine where that is not the native one."""
    return str(spec) + (f" ({spec.engine})" if spec.engine != "native" else "")


@dataclass
class Loss:
    """Sums over the tensors of one moment. ``copied`` tensors kept their bits, ``encoded`` were decoded and encoded."""

    copied: int = 0
    encoded: int = 0
    squared_error: float = 0.0
    squared: float = 0.0

    @property
    def relative_error(self) -> float:
        """Root of the summed squared error over root of the summed squares; 0 where nothing changed."""
        if self.squared_error == 0:
            return 0.0
        return sqrt(self.squared_error / self.squared) if self.squared > 0 else nan


@dataclass
class Conversion:
    """What became of the state: ``losses`` by moment (and of the value that a master and its weights stand for), what
    the new spec does not keep (``dropped``), moments that were made up as the caller said (``filled``), and
    hyperparameters that changed with the rule."""

    before: str
    after: str
    losses: dict[str, Loss] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    filled: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, other: Conversion) -> None:
        """What became of more parameters."""
        for moment, loss in other.losses.items():
            mine = self.losses.setdefault(moment, Loss())
            for field_ in fields(Loss):
                setattr(mine, field_.name, getattr(mine, field_.name) + getattr(loss, field_.name))
        self.dropped += [moment for moment in other.dropped if moment not in self.dropped]
        self.filled.update(other.filled)

    @property
    def relative_error(self) -> dict[str, float]:
        return {moment: loss.relative_error for moment, loss in self.losses.items()}

    def __str__(self) -> str:
        lines = [f"{self.before} -> {self.after}"]
        for moment, loss in self.losses.items():
            what = f"{loss.encoded} tensors encoded anew, relative error {loss.relative_error:.2g}"
            copied = f"{loss.copied} copied bit for bit"
            lines.append(f"  {moment}: " + ", ".join(([what] if loss.encoded else []) + [copied] * bool(loss.copied)))
        lines += [f"  {moment}: not kept by the new spec, dropped" for moment in self.dropped]
        lines += [f"  {moment}: filled with {value!r}" for moment, value in self.filled.items()]
        return "\n".join(lines + [f"  {note}" for note in self.notes])
