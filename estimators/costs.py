"""The estimate: rows of bytes for each of some specs."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string, which
# takes a millisecond per class, and the calculator has to answer at once.

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from estimators.fields import InputError, shown
from estimators.hardware import capacity
from estimators.held import SHARDS_ALSO, rows_of, step_temporaries
from estimators.model import Model, resolve
from estimators.rows import GPU, HOST, PAGEABLE, PHASES, Peak, Row, peak
from estimators.step_rows import run
from estimators.trained import as_trained
from estimators.training import BUCKET, MORE, Training
from estimators.units import dtype

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from estimators.activations import Activations
    from memopt.keywords import SpecKeywords
    from memopt.spec import OptimSpec

__all__ = ["GPU", "HOST", "PAGEABLE", "PHASES", "Column", "Estimate", "Peak", "Row", "estimate", "peak"]

#: What an estimate without activations does not contain.
WITHOUT = ("temporaries of the step", "CUDA context", "allocator rounding")
_MAX_WORLD_SIZE = 10**6


class Column:
    """The estimate for one spec. ``low`` and ``high`` are the peak's GPU bytes at the bounds of its rows; ``options``
    is what its placement was told, ``hyper`` the hyperparameters that were given."""

    __slots__ = ("high", "hyper", "low", "options", "peak", "rows", "spec")

    def __init__(
        self,
        spec: str,
        rows: Sequence[Row],
        options: "Mapping[str, Any] | None" = None,
        hyper: "Mapping[str, Any] | None" = None,
    ) -> None:
        self.spec = spec
        self.rows = tuple(rows)
        self.options, self.hyper = dict(options or {}), dict(hyper or {})
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
    deepspeed: bool = False,
    bucket: int = BUCKET,
    mixed: str = "",
    **fields: "Unpack[SpecKeywords]",
) -> Estimate:
    """What one rank needs to train ``model`` with one spec or with each of several; does not import torch.

    Args:
        model: A parameter count (``8_000_000_000``, ``"8B"``), the name of a built-in architecture, the path of a
            config.json, of a folder that holds one or of safetensors files, a configuration as a mapping, or a
            ``torch.nn.Module`` (also on the meta device).
        spec: A spec as of :func:`memopt.create`, or several, which become the columns of a table.
        gpu: A card's name, a size (``"24GiB"``) or bytes; None asks only what is needed.
        weights: Their dtype, torch's name; default a module's or file's own, else bfloat16.
        gradients: Theirs; default as the weights.
        world_size: Number of data-parallel ranks; figures are those of the fullest one.
        batch: Sequences in one micro-batch on one rank.
        seq: Tokens in a sequence; 0 counts weights, gradients and state only, no activations.
        checkpointing: Activation checkpointing: ``"none"``, ``"full"``, ``"selective"`` or ``"every-K"`` blocks.
        attention: ``"sdpa"``, ``"flash"`` or ``"eager"``.
        lora: Rank of adapters on all linear layers; 0 trains the model itself.
        quantised: Storage of the adapted weights, ``"nf4"`` or ``"nf4-double"``; ``""`` keeps their dtype.
        accumulate: Micro-batches in one step.
        device: ``"cuda"`` or ``"cpu"``.
        release_gradients: Whether :meth:`memopt.Optimizer.release_gradients` steps in ``backward()``.
        deepspeed: Whether DeepSpeed runs the step, at the stage that the spec's partition names.
        bucket: Its buckets, in elements.
        mixed: ``"bf16"`` or ``"fp16"``: weights in fp32 and products in this dtype, by FSDP2's policy under ``/zero2``
            and ``/zero3``, else by torch.autocast.
        fields: Hyperparameters, placement options and fields of :class:`memopt.OptimSpec`, as of :func:`memopt.create`.

    Returns:
        An :class:`Estimate`: ``columns`` by spec, ``rows`` in bytes, the ``peak`` and its phase, ``fits``.

    Raises:
        InputError: for a model, a card or a number that is not allowed.
        SpecError: for a spec or a keyword that is not allowed.

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
    training = Training(
        **{name: fields.pop(name, value) for name, value in MORE.items()},
        batch=batch,
        seq=seq,
        checkpointing=checkpointing,
        attention=attention,
        lora=lora,
        quantised=quantised,
        accumulate=accumulate,
        device=device,
        release_gradients=release_gradients,
        deepspeed=deepspeed,
        bucket=bucket,
        mixed=mixed,
    ).checked()
    specs = _parsed(spec, dict(fields))
    nbytes = gpu if gpu is None or isinstance(gpu, int) else capacity(gpu)
    described = resolve(model)
    weight_dtype = None if weights is None else dtype(weights, "weights")
    if mixed and not lora and weight_dtype not in (None, "float32"):
        raise InputError(f"mixed={mixed!r} is for weights in float32, not {weight_dtype}, unless adapters train")
    weight_dtype = weight_dtype or ("float32" if mixed else None)
    gradient_dtype = None if gradients is None else dtype(gradients, "gradients")
    described = as_trained(described, training, weight_dtype)
    runs = {
        own: run(described, training, own, training.outputs == "kept")
        for own in {_own_precision(s, training) for s in specs}
    }
    ran, missing = runs[_own_precision(specs[0], training)]
    columns = []
    without = (missing, *(() if training.seq else WITHOUT)) if missing else ()
    for one in specs:
        of_the_step = step_temporaries(described, one, world_size, None, training) if training.seq else 0
        if of_the_step is None and "temporaries of the step" not in without:
            without = (*without, "temporaries of the step")
        held = rows_of(
            described,
            one,
            None,
            gradient_dtype,
            world_size,
            training,
            runs[_own_precision(one, training)][0],
            of_the_step,
        )
        columns.append(Column(str(one), held, one.options, one.hyper))
    return Estimate(
        described,
        columns,
        nbytes,
        weight_dtype or _one(described, all_=True),
        gradient_dtype or _one(described, all_=False),
        world_size,
        training,
        ran,
        without,
    )


def _own_precision(spec: "OptimSpec", training: Training) -> bool:
    """Whether mixed precision is FSDP2's, which computes in it throughout."""
    return bool(training.mixed) and SHARDS_ALSO.get(spec.partition, (False,))[0]


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
