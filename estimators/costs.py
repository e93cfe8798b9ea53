"""The estimate: rows of bytes for each of some specs."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string, which
# takes a millisecond per class, and the calculator has to answer at once.

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from estimators.fields import InputError, shown
from estimators.hardware import capacity
from estimators.lora import NF4, with_adapters
from estimators.model import Model, Shape, resolve
from estimators.rows import GPU, HOST, PAGEABLE, PHASES, Peak, Row, peak
from estimators.state import state_nbytes, temporaries, weight_dtype
from estimators.training import Training, one_gradient, released, rows, run, runtime
from estimators.units import dtype

if TYPE_CHECKING:
    from estimators.activations import Activations
    from memopt.spec import OptimSpec

__all__ = ["GPU", "HOST", "PAGEABLE", "PHASES", "Column", "Estimate", "Peak", "Row", "estimate", "peak"]

#: What an estimate without activations does not contain.
WITHOUT = ("temporaries of the step", "CUDA context", "allocator rounding")
#: partition -> whether it shards weights and gradients too, and gives a block's weights up after its forward pass.
_SHARDS_ALSO: dict[str, tuple[bool, bool]] = {
    "none": (False, False), "zero1": (False, False), "zero2": (True, False), "zero3": (True, True),
}  # fmt: skip
_MAX_WORLD_SIZE = 10**6


class Column:
    """The estimate for one spec. ``low`` and ``high`` are the peak's GPU bytes at the bounds of its rows."""

    __slots__ = ("high", "low", "peak", "rows", "spec")

    def __init__(self, spec: str, rows: Sequence[Row]) -> None:
        self.spec = spec
        self.rows = tuple(rows)
        self.peak = peak(spec, self.rows)
        self.low = peak(spec, self.rows, "low").nbytes
        self.high = peak(spec, self.rows, "high").nbytes

    def nbytes(self, what: str, tier: str | None = None) -> int:
        """Bytes of the rows of one kind, of one tier or of all, in the phase that has most of them."""
        chosen = [r for r in self.rows if r.what == what and tier in (None, r.tier)]
        return max(sum(r.nbytes for r in chosen if phase in r.phases) for phase in PHASES)

    def at_peak(self, what: str) -> int:
        """GPU bytes of one kind in the phase of the peak: over all kinds they add up to it."""
        return sum(r.nbytes for r in self.rows if r.what == what and r.tier == GPU and self.peak.phase in r.phases)

    def over(self, gpu: int) -> int:
        """Bytes by which the peak exceeds a card's memory; 0 where it fits."""
        return max(0, self.peak.nbytes - gpu)

    def paged_out(self, gpu: int) -> int:
        """Pageable bytes that have to be on the host at the peak."""
        return min(self.peak.pageable, max(0, self.peak.nbytes + self.peak.pageable - gpu))


class Estimate:
    """What a model costs with each of some specs.

    ``columns`` are the estimates by spec, ``rows`` all their rows; ``peak`` is the lowest peak among them (that of
    the spec, if there is one) and names its spec. ``fits`` is None without a card, else whether some spec fits.
    ``gpu`` is the card's memory in bytes, or None. ``training`` is the step, ``activations`` what the model's formula
    says of it or None, ``without`` what the figures do not contain.
    """

    __slots__ = ("activations", "columns", "gpu", "gradients", "model", "parameters", "trainable", "training",
                 "weights", "without", "world_size")  # fmt: skip

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

    @property
    def fits(self) -> bool | None:
        gpu = self.gpu
        return None if gpu is None else any(not column.over(gpu) for column in self.columns)

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


def estimate(
    model: Any,
    spec: "str | OptimSpec | Sequence[str | OptimSpec]" = "adamw-8bit",
    *,
    gpu: str | int | None = None,
    weights: str | None = None,
    gradients: str | None = None,
    world_size: int = 1,
    batch: int = 1,
    seq: int = 0,
    checkpointing: str = "none",
    attention: str = "sdpa",
    lora: int = 0,
    quantised: str = "",
    accumulate: int = 1,
    device: str = "cuda",
    release_gradients: bool = False,
    **fields: Any,
) -> Estimate:
    """What one rank needs to train ``model`` with one spec or with each of several.

    ``model`` is a parameter count (``8_000_000_000``, ``"8B"``), the name of a built-in architecture, the path of a
    config.json, of a folder that holds one or of safetensors files, a configuration as a mapping, or a
    torch.nn.Module (also on the meta device). ``gpu`` is a card's name, a size (``"24GiB"``) or bytes. ``weights`` and
    ``gradients`` are dtypes: by default a module's or file's own, else bfloat16, and gradients as the weights.
    ``world_size`` is the number of data-parallel ranks; figures are those of the fullest one.

    ``seq`` is tokens per sequence and ``batch`` sequences per micro-batch; without ``seq`` only weights, gradients and
    state are counted. ``checkpointing`` is ``none`` or ``full``, ``attention`` is ``sdpa``, ``flash`` or ``eager``,
    ``lora`` the rank of adapters on all linear layers (0: none), ``quantised`` the storage of the adapted weights
    (``nf4``, ``nf4-double``), ``accumulate`` micro-batches per step, ``device`` is ``cuda`` or ``cpu``;
    ``release_gradients`` is :meth:`memopt.Optimizer.release_gradients`.

    Other keywords are hyperparameters or fields of :class:`memopt.OptimSpec`, as in :func:`memopt.price`.
    Raises :class:`InputError` or :class:`memopt.SpecError`.

    >>> e = estimate("gpt2", "adamw-8bit", gpu="8GiB")
    >>> e.parameters, e.fits, e.peak.phase
    (124439808, True, 'step')
    >>> estimate("llama-3.1-8b", seq=2048, checkpointing="full").activations.saved
    1654693888
    """
    if isinstance(world_size, bool) or not isinstance(world_size, int) or not 1 <= world_size <= _MAX_WORLD_SIZE:
        raise InputError(f"world_size={shown(world_size)} is not allowed; it is from 1 to {_MAX_WORLD_SIZE}")
    if isinstance(gpu, bool) or (isinstance(gpu, int) and gpu < 1):
        raise InputError(f"gpu={shown(gpu)} is not allowed; it is a card's name, a size such as '24GiB' or bytes >= 1")
    training = Training(batch, seq, checkpointing, attention, lora, quantised, accumulate, device,
                        release_gradients).checked()  # fmt: skip
    specs = _parsed(spec, fields)
    nbytes = gpu if gpu is None or isinstance(gpu, int) else capacity(gpu)
    described = resolve(model)
    if lora:
        described = with_adapters(described, lora, quantised)
    weight_dtype = None if weights is None else dtype(weights, "weights")
    gradient_dtype = weight_dtype if gradients is None else dtype(gradients, "gradients")
    own = weight_dtype or described.dtypes.get(described.shapes[0][0], "bfloat16") if described.shapes else "bfloat16"
    ran, missing = run(described, training, 4 if own == "float32" else 2)
    columns = []
    for one in specs:
        held = _rows(described, one, weight_dtype, gradient_dtype, world_size, training, ran)
        columns.append(Column(str(one), held))
    without = (missing, *(() if training.seq else WITHOUT)) if missing else ()
    if training.seq and any(temporaries(described, one, world_size, weight_dtype) is None for one in specs):
        without = (*without, "temporaries of the step")
    return Estimate(described, columns, nbytes, weight_dtype or _one(described, all_=True),
                    gradient_dtype or _one(described, all_=False), world_size, training, ran, without)  # fmt: skip


def _one(model: Model, *, all_: bool) -> str:
    """The dtype of all weights, or of those that train; ``mixed`` where there are several."""
    kinds = {model.dtypes.get(name, "bfloat16") for name, _ in model.shapes if all_ or name not in model.frozen}
    return kinds.pop() if len(kinds) == 1 else "mixed" if kinds else "bfloat16"


def _parsed(spec: Any, fields: dict[str, Any]) -> "list[OptimSpec]":
    """The specs, each once."""
    from memopt.pricing import spec_fields
    from memopt.spec import OptimSpec, parse

    several = [spec] if isinstance(spec, (str, OptimSpec)) else list(spec)
    if not several:
        raise InputError("no spec was given; one is, for example, 'adamw-8bit'")
    given = spec_fields(fields)
    unique: dict[str, OptimSpec] = {}
    for one in several:
        parsed = parse(one, **given)
        unique.setdefault(str(parsed), parsed)
    return list(unique.values())


def _rows(
    model: Model, spec: "OptimSpec", weights: str | None, gradients: str | None, world_size: int, training: Training,
    ran: "Activations | None",
) -> list[Row]:  # fmt: skip
    if spec.partition not in _SHARDS_ALSO:
        raise InputError(f"'{spec}': what {spec.partition} shards besides the state is not known to the calculator; "
                         f"it knows {', '.join(_SHARDS_ALSO)}")  # fmt: skip
    name, known = str(spec), model.provenance
    here = _fullest(model, spec, world_size)
    held = [Row(name, "weights", kind, n, GPU, PHASES, known)
            for kind, n in _by_dtype(here, weights, all_=True)]  # fmt: skip
    if model.buffers:
        held.append(Row(name, "buffers", "", model.buffers, GPU, PHASES, known))
    step_phase = "backward" if training.release_gradients else "step"  # in which parameters step
    by_dtype = _by_dtype(here, gradients, all_=False)
    if training.release_gradients:
        by_dtype = released(model, here, lambda n, shape: _nbytes(model, n, shape, gradients))
    if here is not model:
        held += _whole_at_work(model, spec, weights, gradients)
    if ran:
        held += rows(name, model, training, ran, by_dtype, known)
    elif training.release_gradients:
        held += one_gradient(name, by_dtype, known)
    else:
        held += [Row(name, "gradients", kind, n, GPU, ("backward", "step"), known) for kind, n in by_dtype]
    # With activations every phase but loading is told apart, and state is there from the second step on.
    phases = PHASES[1:] if ran else ("backward", "step")
    held += [Row(name, "state", moment, n, tier, phases, known)
             for (moment, tier), n in state_nbytes(model, spec, world_size, weights).items()]  # fmt: skip
    if training.seq and training.device != "cpu":
        tmp = temporaries(model, spec, world_size, weights)
        if tmp:
            held.append(Row(name, "temporaries", "of the plain step, largest parameter", tmp, GPU, (step_phase,),
                            "measured constant", 0, tmp))  # fmt: skip
        held += runtime(name, held)
    return held


def _fullest(model: Model, spec: "OptimSpec", world_size: int) -> Model:
    """The model whose parameters are the rows of the fullest rank, which is the first."""
    from memopt.partitions import PARTITIONS

    if not _SHARDS_ALSO[spec.partition][0] or world_size == 1:
        return model
    rows = PARTITIONS[spec.partition].rows
    return model._replace(shapes=tuple((name, rows(shape, 0, world_size).local_shape) for name, shape in model.shapes))


def _whole_at_work(model: Model, spec: "OptimSpec", weights: str | None, gradients: str | None) -> list[Row]:
    """Weights and gradients that FSDP2 holds whole while blocks compute."""
    from estimators.sharding import gathered, unreduced

    def sizes(given: str | None, all_: bool) -> list[tuple[str, int]]:
        named = [(n, model._replace(shapes=((n, shape),))) for n, shape in model.shapes]
        return [(n, sum(nbytes for _, nbytes in _by_dtype(one, given, all_=all_))) for n, one in named]

    name, reshard = str(spec), _SHARDS_ALSO[spec.partition][1]
    whole, raw = gathered(sizes(weights, True), reshard=reshard), unreduced(sizes(gradients, False))
    detail = "gathered, two blocks" if reshard else "gathered"
    return [
        Row(name, "weights", detail, whole, GPU, PHASES[1:4], "formula"),
        Row(name, "gradients", "whole, before they are reduced", raw, GPU, ("backward",), "formula"),
    ]


def _by_dtype(model: Model, given: str | None, *, all_: bool) -> list[tuple[str, int]]:
    """Bytes by dtype: of all parameters, or of those that train."""
    totals: dict[str, int] = {}
    for name, shape in model.shapes:
        if all_ or name not in model.frozen:
            kind, n = _nbytes(model, name, shape, given)
            totals[kind] = totals.get(kind, 0) + n
    return list(totals.items())


def _nbytes(model: Model, name: str, shape: Shape, given: str | None) -> tuple[str, int]:
    """dtype and bytes of one parameter, or of its gradient."""
    from memopt.ledger import ITEMSIZE

    kind = weight_dtype(model, name, given)
    if kind in NF4:
        return kind, -int(-prod(shape) * NF4[kind] // 1)
    if kind not in ITEMSIZE:
        raise InputError(f"{name} has the dtype {kind}; known are {', '.join(ITEMSIZE)}")
    return kind, prod(shape) * ITEMSIZE[kind]
