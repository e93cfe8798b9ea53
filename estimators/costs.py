"""Rows of bytes, and the peak over phases."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string, which
# takes a millisecond per class, and the calculator has to answer at once.

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from estimators.fields import InputError, shown
from estimators.hardware import capacity
from estimators.model import Model, Shape, resolve
from estimators.units import dtype

if TYPE_CHECKING:
    from memopt.ledger import Line
    from memopt.spec import OptimSpec

#: The phases of a training step that are told apart, in order. A forward pass without activations holds no more than
#: ``load``. State is allocated in the first step and held from then on: every backward pass but the first meets it.
PHASES = ("load", "backward", "step")
#: What an estimate does not contain yet, to be said wherever one is shown.
WITHOUT = ("activations", "temporaries of the step", "CUDA context", "allocator rounding")

GPU, PAGEABLE, HOST = "GPU", "pageable", "host"
#: Where the parameters are said to be when state is priced.
_DEVICE = "cuda"
#: partition -> what it shards besides the optimizer state.
_SHARDS_ALSO: dict[str, tuple[str, ...]] = {"none": (), "zero1": ()}
_MAX_WORLD_SIZE = 10**6
_MAX_RANKS_PRICED = 32


class Row(NamedTuple):
    """Bytes of one kind on one rank.

    ``what`` is ``weights``, ``buffers``, ``gradients`` or ``state``, ``detail`` the dtype or the moment. ``tier`` is
    ``GPU``, ``pageable`` (GPU memory that moves to the host under pressure), ``host`` or the ledger's own word for
    another place. ``phases`` are those in which the bytes are held. ``provenance`` is ``exact`` (known byte by byte),
    ``formula``, ``measured constant`` or ``assumed`` (shapes were made up for a bare count).
    """

    spec: str
    what: str
    detail: str
    nbytes: int
    tier: str
    phases: tuple[str, ...]
    provenance: str


class Peak(NamedTuple):
    """The phase that needs most: ``nbytes`` of GPU memory that cannot move, ``pageable`` bytes that can, and bytes on
    the host."""

    spec: str
    phase: str
    nbytes: int
    pageable: int
    host: int


class Column:
    """The estimate for one spec."""

    __slots__ = ("peak", "rows", "spec")

    def __init__(self, spec: str, rows: Sequence[Row]) -> None:
        self.spec = spec
        self.rows = tuple(rows)
        self.peak = peak(spec, self.rows)

    def nbytes(self, what: str, tier: str | None = None) -> int:
        """Bytes of the rows of one kind, of one tier or of all."""
        return sum(r.nbytes for r in self.rows if r.what == what and tier in (None, r.tier))

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
    ``gpu`` is the card's memory in bytes, or None.
    """

    __slots__ = ("columns", "gpu", "gradients", "model", "parameters", "trainable", "weights", "world_size")

    def __init__(
        self, model: Model, columns: Sequence[Column], gpu: int | None, weights: str, gradients: str, world_size: int
    ) -> None:
        self.model = model
        self.columns = tuple(columns)
        self.gpu = gpu
        self.weights = weights
        self.gradients = gradients
        self.world_size = world_size
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
    **fields: Any,
) -> Estimate:
    """What one rank needs to train ``model`` with one spec or with each of several, without activations.

    ``model`` is a parameter count (``8_000_000_000``, ``"8B"``), the name of a built-in architecture, the path of a
    config.json, of a folder that holds one or of safetensors files, a configuration as a mapping, or a
    torch.nn.Module (also on the meta device). ``gpu`` is a card's name, a size (``"24GiB"``) or bytes. ``weights`` and
    ``gradients`` are dtypes: by default a module's or file's own, else bfloat16, and gradients as the weights.
    ``world_size`` is the number of data-parallel ranks; figures are those of the fullest one. Other keywords are
    hyperparameters or fields of :class:`memopt.OptimSpec`, as in :func:`memopt.price`.

    Raises :class:`InputError` or :class:`memopt.SpecError`.

    >>> e = estimate("gpt2", "adamw-8bit", gpu="8GiB")
    >>> e.parameters, e.fits, e.peak.phase
    (124439808, True, 'step')
    """
    if isinstance(world_size, bool) or not isinstance(world_size, int) or not 1 <= world_size <= _MAX_WORLD_SIZE:
        raise InputError(f"world_size={shown(world_size)} is not allowed; it is from 1 to {_MAX_WORLD_SIZE}")
    if isinstance(gpu, bool) or (isinstance(gpu, int) and gpu < 1):
        raise InputError(f"gpu={shown(gpu)} is not allowed; it is a card's name, a size such as '24GiB' or bytes >= 1")
    specs = _parsed(spec, fields)
    nbytes = gpu if gpu is None or isinstance(gpu, int) else capacity(gpu)
    described = resolve(model)
    weight_dtype = None if weights is None else dtype(weights, "weights")
    gradient_dtype = weight_dtype if gradients is None else dtype(gradients, "gradients")
    columns = [Column(str(s), _rows(described, s, weight_dtype, gradient_dtype, world_size)) for s in specs]
    own = described.dtypes or {"": "bfloat16"}
    shared = next(iter(set(own.values()))) if len(set(own.values())) == 1 else "mixed"
    return Estimate(described, columns, nbytes, weight_dtype or shared, gradient_dtype or shared, world_size)


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


def _rows(model: Model, spec: "OptimSpec", weights: str | None, gradients: str | None, world_size: int) -> list[Row]:
    if spec.partition not in _SHARDS_ALSO:
        raise InputError(f"'{spec}': what {spec.partition} shards besides the state is not known to the calculator; "
                         f"it knows {', '.join(_SHARDS_ALSO)}")  # fmt: skip
    name, known = str(spec), model.provenance
    rows = [Row(name, "weights", kind, n, GPU, PHASES, known) for kind, n in _by_dtype(model, weights, all_=True)]
    if model.buffers:
        rows.append(Row(name, "buffers", "", model.buffers, GPU, PHASES, known))
    rows += [Row(name, "gradients", kind, n, GPU, ("backward", "step"), known)
             for kind, n in _by_dtype(model, gradients, all_=False)]  # fmt: skip
    rows += [Row(name, "state", moment, n, tier, ("backward", "step"), known)
             for (moment, tier), n in state_nbytes(model, spec, world_size).items()]  # fmt: skip
    return rows


def _by_dtype(model: Model, given: str | None, *, all_: bool) -> list[tuple[str, int]]:
    """Bytes by dtype: of all parameters, or of those that train."""
    from memopt.ledger import ITEMSIZE

    totals: dict[str, int] = {}
    for name, shape in model.shapes:
        if all_ or name not in model.frozen:
            kind = given or model.dtypes.get(name, "bfloat16")
            if kind not in ITEMSIZE:
                raise InputError(f"{name} has the dtype {kind}; known are {', '.join(ITEMSIZE)}")
            totals[kind] = totals.get(kind, 0) + prod(shape) * ITEMSIZE[kind]
    return list(totals.items())


def state_nbytes(model: Model, spec: "OptimSpec", world_size: int) -> dict[tuple[str, str], int]:
    """(moment, tier) -> bytes of :func:`memopt.price` on the fullest rank.

    State depends on a parameter's shape and, through overrides, on its name. So without overrides one parameter of
    each shape is priced and its lines count as often as the shape occurs: the same sum, in a hundredth of the time.
    """
    trainable = [(name, shape) for name, shape in model.shapes if name not in model.frozen]
    count: dict[str, int] = {}
    first: dict[Shape, str] = {}
    for name, shape in trainable:
        one = name if spec.overrides else first.setdefault(shape, name)
        count[one] = count.get(one, 0) + 1
    chosen = [(name, shape) for name, shape in trainable if name in count]
    ranks = candidate_ranks(world_size) if spec.partition != "none" else [0]
    return max((_priced(chosen, count, spec, world_size, rank) for rank in ranks), key=lambda t: sum(t.values()))


def candidate_ranks(world_size: int) -> list[int]:
    """Ranks among which the fullest is looked for: all, or of many an even selection (ranks differ by at most one row
    of each parameter).

    >>> candidate_ranks(3), len(candidate_ranks(1000)), candidate_ranks(1000)[-1]
    ([0, 1, 2], 32, 999)
    """
    n = min(world_size, _MAX_RANKS_PRICED)
    return [world_size * (i + 1) // n - 1 for i in range(n)]


def _priced(
    chosen: list[tuple[str, Shape]], count: dict[str, int], spec: "OptimSpec", world_size: int, rank: int
) -> dict[tuple[str, str], int]:
    from memopt.pricing import price

    totals: dict[tuple[str, str], int] = {}
    for line in price(chosen, spec, world_size=world_size, rank=rank, device=_DEVICE):
        key = (line.moment, tier(line))
        times = 1 if line.lifetime == "shared" else count[line.parameter]
        totals[key] = totals.get(key, 0) + line.nbytes * times
    return totals


def tier(line: "Line") -> str:
    """The tier of a ledger line, from its location."""
    if line.location == _DEVICE:
        return GPU
    if line.location.startswith("paged:"):
        return PAGEABLE
    return HOST if line.location == "cpu" else line.location.partition(":")[0]


def peak(spec: str, rows: Sequence[Row]) -> Peak:
    """The maximum over phases of what is held at once, never a sum of maxima; of equal phases the last."""
    totals = []
    for order, phase in enumerate(PHASES):
        held = {GPU: 0, PAGEABLE: 0, HOST: 0}
        for row in rows:
            if phase in row.phases:
                held[row.tier if row.tier in (GPU, PAGEABLE) else HOST] += row.nbytes
        totals.append((held[GPU] + held[PAGEABLE], order, Peak(spec, phase, held[GPU], held[PAGEABLE], held[HOST])))
    return max(totals)[2]
