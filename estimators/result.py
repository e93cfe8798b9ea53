"""What an estimate is: rows of bytes for each of some specs, and the peak of each."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string, which
# takes a millisecond per class, and the calculator has to answer at once.

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from estimators.memory.memory_row import FIGURES, GPU, PHASES, Peak, Row, figure, peak
from estimators.models.model import Model
from estimators.training import Training

if TYPE_CHECKING:
    from estimators.activations import Activations

#: Version of the JSON form. Keys are only ever added under one number.
SCHEMA = "memopt.estimate/1"


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

    def to_json(self, gpu: int | None) -> dict[str, Any]:
        """Its part of the JSON form, for a card of so many bytes."""
        said = "" if gpu is None else self.verdict(gpu)
        return {
            "spec": self.spec,
            "options": self.options,
            "hyper": self.hyper,
            "fits": said == "FITS" if said else None,
            "verdict": said or None,
            "without": list(self.without),
            "over_nbytes": None if gpu is None else self.over(gpu),
            "paged_out_nbytes": None if gpu is None else self.paged_out(gpu),
            "state_nbytes": self.nbytes("state"),
            "peak": {
                "phase": self.peak.phase,
                "gpu_nbytes": self.peak.nbytes,
                "pageable_nbytes": self.peak.pageable,
                "host_nbytes": self.peak.host,
                "low_nbytes": self.low,
                "high_nbytes": self.high,
                **{name: getattr(self, name)._asdict() for name in FIGURES},
            },
            "rows": [{**row._asdict(), "phases": list(row.phases)} for row in self.rows],
        }


class Estimate:
    """What a model costs with each of some specs.

    ``columns`` are the estimates by spec, ``rows`` all their rows; ``peak`` is the lowest peak among them (that of
    the spec, if there is one) and names its spec. ``fits`` is whether some spec fits at most; None without a card and
    where that is not known. ``gpu`` is the card's memory in bytes, or None. ``training`` is the step, ``activations``
    what the model's formula says of it or None, ``without`` what the figures do not contain. ``as_text`` writes the
    table that ``str`` gives.
    """

    __slots__ = (
        "_as_text",
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
        as_text: "Callable[[Estimate], str]",
    ) -> None:
        self._as_text = as_text
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
        return {
            "schema": SCHEMA,
            "model": {
                "name": self.model.name,
                "parameters": self.parameters,
                "trainable": self.trainable,
                "tensors": len(self.model.shapes),
                "provenance": self.model.provenance,
                "notes": list(self.model.notes),
            },
            "weights": self.weights,
            "gradients": self.gradients,
            "world_size": self.world_size,
            "gpu_nbytes": self.gpu,
            "without": list(self.without),
            "training": self.training._asdict(),
            "saved_nbytes": None if self.activations is None else self.activations.saved,
            "fits": self.fits,
            "specs": [column.to_json(self.gpu) for column in self.columns],
        }

    def __str__(self) -> str:
        return self._as_text(self)

    def __repr__(self) -> str:
        specs = ", ".join(c.spec for c in self.columns)
        return f"Estimate({self.model.name!r}, {self.parameters:,} parameters, {specs})"
