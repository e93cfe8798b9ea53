"""What an estimate is: rows of bytes for each of some specs, and the peak of each."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string, which
# takes a millisecond per class, and the calculator has to answer at once.

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from estimators.model import Model
from estimators.rows import FIGURES, GPU, PHASES, Peak, Row, figure, peak
from estimators.training import Training

if TYPE_CHECKING:
    from estimators.activations import Activations


class Column:
    """The estimate for one spec.

    ``allocated``, ``reserved`` and ``process`` are three figures of GPU memory, each at least, expected and at most:
    what torch.cuda.max_memory_allocated() and max_memory_reserved() will say, and what nvidia-smi will show. ``peak``
    is the phase of the last, ``low`` and ``high`` its bounds; ``without`` is what they do not contain. ``options`` is
    what the placement was told, ``hyper`` the hyperparameters that were given.
    """

    __slots__ = (
        "allocated",
        "high",
        "hyper",
        "low",
        "options",
        "peak",
        "process",
        "reserved",
        "rows",
        "spec",
        "without",
    )

    def __init__(
        self,
        spec: str,
        rows: Sequence[Row],
        options: "Mapping[str, Any] | None" = None,
        hyper: "Mapping[str, Any] | None" = None,
        without: tuple[str, ...] = (),
    ) -> None:
        self.spec, self.without = spec, without
        self.rows = tuple(rows)
        self.options, self.hyper = dict(options or {}), dict(hyper or {})
        self.peak = peak(spec, self.rows)
        self.allocated, self.reserved, self.process = (figure(self.rows, name) for name in FIGURES)
        self.low, _, self.high = self.process

    def nbytes(self, what: str, tier: str | None = None) -> int:
        """Bytes of the rows of one kind, of one tier or of all, in the phase that has most of them."""
        chosen = [r for r in self.rows if r.what == what and tier in (None, r.tier)]
        return max(sum(r.nbytes for r in chosen if phase in r.phases) for phase in PHASES)

    def at_peak(self, what: str) -> int:
        """GPU bytes of one kind in the phase of the peak: over all kinds they add up to it."""
        return sum(r.nbytes for r in self.rows if r.what == what and r.tier == GPU and self.peak.phase in r.phases)

    def over(self, gpu: int) -> int:
        """Bytes by which the expected peak exceeds a card's memory; 0 where it does not."""
        return max(0, self.peak.nbytes - gpu)

    def verdict(self, gpu: int) -> str:
        """``FITS``: it does at most; ``TIGHT``: only the expected value does; ``over``: not even that. Empty where the
        figures do not contain everything (``without``) and what they contain does not say ``over``."""
        if self.over(gpu):
            return "over"
        if self.without:
            return ""
        return "FITS" if self.process.high <= gpu else "TIGHT"

    def paged_out(self, gpu: int) -> int:
        """Pageable bytes that have to be on the host at the peak."""
        return min(self.peak.pageable, max(0, self.peak.nbytes + self.peak.pageable - gpu))


class Estimate:
    """What a model costs with each of some specs.

    ``columns`` are the estimates by spec, ``rows`` all their rows; ``peak`` is the lowest peak among them (that of
    the spec, if there is one) and names its spec. ``fits`` is whether some spec fits at most; None without a card and
    where that is not known. ``gpu`` is the card's memory in bytes, or None. ``training`` is the step, ``activations``
    what the model's formula says of it or None, ``without`` what the figures do not contain.
    """

    __slots__ = (
        "activations",
        "columns",
        "gpu",
        "gradients",
        "model",
        "parameters",
        "trainable",
        "training",
        "weights",
        "without",
        "world_size",
    )

    def __init__(
        self,
        model: Model,
        columns: Sequence[Column],
        gpu: int | None,
        weights: str,
        gradients: str,
        world_size: int,
        training: Training,
        activations: "Activations | None",
        without: tuple[str, ...],
    ) -> None:
        self.model = model
        self.columns = tuple(columns)
        self.gpu = gpu
        self.weights = weights
        self.gradients = gradients
        self.world_size = world_size
        self.training = training
        self.activations = activations
        self.without = without
        self.parameters = sum(prod(shape) for _, shape in model.shapes)
        self.trainable = sum(prod(shape) for name, shape in model.shapes if name not in model.frozen)

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(row for column in self.columns for row in column.rows)

    @property
    def peak(self) -> Peak:
        return min((column.peak for column in self.columns), key=lambda p: p.nbytes)

    def verdict(self, column: Column) -> str:
        """``FITS``, ``TIGHT`` or ``over``; empty without a card, and where it is not known."""
        return "" if self.gpu is None else column.verdict(self.gpu)

    @property
    def fits(self) -> bool | None:
        """Whether some spec fits at most; None without a card, and where that is not known."""
        verdicts = [self.verdict(column) for column in self.columns]
        return True if "FITS" in verdicts else None if "" in verdicts else False

    def __getitem__(self, spec: str) -> Column:
        for column in self.columns:
            if column.spec == spec:
                return column
        raise KeyError(f"{spec!r} was not estimated; the specs are {', '.join(c.spec for c in self.columns)}")

    def to_json(self) -> dict[str, Any]:
        """The documented JSON form (docs/estimates.md)."""
        from estimators.report import as_json

        return as_json(self)

    def __str__(self) -> str:
        from estimators.report import as_text

        return as_text(self)

    def __repr__(self) -> str:
        specs = ", ".join(c.spec for c in self.columns)
        return f"Estimate({self.model.name!r}, {self.parameters:,} parameters, {specs})"
