"""A world of many ranks before it exists: what each holds, how even that is, and what a step sends."""

# Without `from __future__ import annotations`: string annotations on a NamedTuple cost a millisecond of start-up.

from typing import TYPE_CHECKING, Any, NamedTuple

from memopt.core.ledger import ITEMSIZE, TensorSpec
from memopt.partitions import PARTITIONS
from memopt.pricing.price import named_tensors, price, spec_fields
from memopt.spec import OptimSpec, parse

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from memopt.keywords import SpecKeywords


class Balance(NamedTuple):
    """``nbytes`` of state on each rank. ``gathered`` are the bytes that arrive on each rank in one step because the
    optimizer sends updated rows (``/zero1``), ``buckets`` in how many all-gathers; FSDP2's own traffic and sums for
    whole-tensor statistics are not counted."""

    nbytes: tuple[int, ...]
    gathered: int
    buckets: int

    @property
    def total(self) -> int:
        return sum(self.nbytes)

    @property
    def max_over_mean(self) -> float:
        """1 for a perfect balance (and for no state)."""
        return max(self.nbytes) * len(self.nbytes) / self.total if self.total else 1.0


def balance(
    model_or_shapes: Any,
    spec: str | OptimSpec,
    *,
    world_size: int,
    dtype: str = "bfloat16",
    **fields: "Unpack[SpecKeywords]",
) -> Balance:
    """What :func:`memopt.price` says on each of ``world_size`` ranks, all at once, and how even that is.

    Equal shapes with equal rows are priced once, so a thousand ranks of the largest model take well under a second.

    Args:
        model_or_shapes: A model, a mapping from name to shape, or an iterable of shapes or ``(name, shape)`` pairs, as
            for :func:`memopt.price`.
        spec: The spec, with its partition (``"adamw-8bit/zero3"``); without one every rank holds everything.
        world_size: Number of ranks, >= 1.
        dtype: The parameters' where only shapes are given, torch's name without its prefix.
        fields: Hyperparameters, placement options and fields of :class:`OptimSpec`, as of :func:`memopt.create`.

    Returns:
        A :class:`Balance`: bytes on each rank, the largest over the mean, bytes gathered in a step.

    Raises:
        SpecError: for a spec, a keyword or a shape that is not allowed.

    >>> balance({"weight": (1000, 1024), "bias": (1000,)}, "adamw-8bit/zero3", world_size=3).nbytes
    (697400, 697400, 693224)
    """
    parsed = parse(spec, **spec_fields(fields))
    tensors = named_tensors(model_or_shapes, dtype)
    parsed = parsed.for_names([name for name, _ in tensors])
    partition = PARTITIONS[parsed.partition]
    count: dict[tuple[str, TensorSpec], int] = {}
    first: dict[TensorSpec, str] = {}
    for name, tensor in tensors:
        one = name if parsed.overrides or parsed.is_mixed else first.setdefault(tensor, name)
        count[one, tensor] = count.get((one, tensor), 0) + 1
    totals = [0] * world_size
    for (name, tensor), times in count.items():
        priced: dict[Any, int] = {}
        for rank in range(world_size):
            rows = partition.rows(tensor.shape, rank, world_size)
            key = rows.local_shape  # what a rank holds depends on how much it holds, not on where
            if key not in priced:
                priced[key] = _one(name, tensor, parsed, rank, world_size)
            totals[rank] += times * priced[key]
    return Balance(tuple(totals), *_traffic(tensors, parsed, world_size))


def _one(name: str, tensor: TensorSpec, spec: OptimSpec, rank: int, world_size: int) -> int:
    """Bytes of one parameter's state on one rank; patterns that match other parameters are not looked for."""
    return price([(name, tensor)], spec.alone(name, tensor.shape), rank=rank, world_size=world_size).nbytes


def _traffic(tensors: list[tuple[str, TensorSpec]], spec: OptimSpec, world_size: int) -> tuple[int, int]:
    """Bytes that a rank receives, and the number of all-gathers, as ``Zero1`` makes them."""
    if spec.partition != "zero1" or world_size == 1:
        return 0, 0
    from memopt.partitions.zero1 import Zero1, buckets

    gathered = 0
    ranges = buckets([tensor.nbytes for _, tensor in tensors], [tensor.dtype for _, tensor in tensors])
    longest: dict[tuple[tuple[int, ...], ...], int] = {}  # layers repeat, and so do their buckets
    for start, stop in ranges:
        shapes = tuple(tensor.shape for _, tensor in tensors[start:stop])
        if shapes not in longest:
            longest[shapes] = max(
                sum(Zero1.rows(shape, rank, world_size).numel for shape in shapes) for rank in range(world_size)
            )
        gathered += longest[shapes] * world_size * ITEMSIZE[tensors[start][1].dtype]
    return gathered, len(ranges)
