"""The ledger of state that does not exist yet: the one layout from which state is also allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from memopt.core.hyperparameters import SpecError
from memopt.core.ledger import ITEMSIZE, Ledger, Line, TensorSpec
from memopt.core.param_kinds import kinds
from memopt.core.param_names import clean_names
from memopt.core.rows import Rows
from memopt.engines import ENGINES
from memopt.layout.chunks import ChunkedState
from memopt.layout.param import resolve_layout
from memopt.partitions import PARTITIONS, Partition
from memopt.placements import PLACEMENTS, Placement
from memopt.spec import FIELDS, OptimSpec, parse
from memopt.spec.placement_options import OPTIONS

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from memopt.keywords import SpecKeywords


def price(
    model_or_shapes: Any,
    spec: str | OptimSpec,
    *,
    world_size: int | None = None,
    rank: int = 0,
    device: str = "cpu",
    dtype: str = "bfloat16",
    capturable: bool = False,
    deepspeed: int | None = None,
    tp: int = 1,
    ep: int = 1,
    **fields: Unpack[SpecKeywords],
) -> Ledger:
    """What the optimizer state will cost on one rank, before anything is allocated; does not import torch.

    The same lines as :meth:`memopt.Optimizer.ledger` reads from live tensors, byte for byte, because state is allocated
    from them.

    Args:
        model_or_shapes: A model (parameters that require gradients, shared ones once; on the ``meta`` device they cost
            nothing), a mapping from name to shape, or an iterable of shapes or of ``(name, shape)`` pairs.
        spec: As of :func:`memopt.create`.
        world_size: Number of ranks. None: a model that is sharded already as this rank holds it, any other for one
            process.
        rank: Whose state, 0 <= rank < world_size.
        device: Where the parameters will be; names the location in the ledger.
        dtype: The parameters' where only shapes are given, torch's name without its prefix. Only master weights depend
            on it, which are kept for bfloat16 and float16.
        capturable: As of :func:`memopt.create`; the step count is on the device then.
        deepspeed: DeepSpeed's ZeRO stage where it partitions the parameters: 1, 2 or 3, all of them in one group.
        tp: Degree of tensor parallelism, for shapes that are not cut yet: :mod:`memopt.layout.model_parallel` says
            which are, by their names. Of pipeline parallelism price the stage's parameters; with context parallelism
            ``world_size`` counts its ranks too, with replicas (HSDP) the ranks of one of them.
        ep: Degree of expert parallelism, over ranks that ``world_size`` counts.
        fields: Hyperparameters, placement options and fields of :class:`OptimSpec`, as of :func:`memopt.create`.

    Returns:
        A :class:`Ledger`: one :class:`Line` for each tensor, ``nbytes`` their sum, ``by("moment")`` sums of groups.

    Raises:
        SpecError: for a spec, a keyword, a shape or a rank that is not allowed.

    >>> price({"weight": (1024, 1024), "bias": (1024,)}, "adamw-8bit").nbytes
    2138120
    >>> price({"h.0.q_proj.weight": (1024, 1024)}, "adamw/zero3", world_size=4, tp=2).nbytes
    1048580
    >>> price({"weight": (1024, 1024)}, "adamw/zero1", world_size=8).nbytes
    1048580
    >>> price({"weight": (1024, 1024)}, "adamw-8bit+split").by("moment")["correction"]
    1048576
    """
    spec = parse(spec, **spec_fields(fields))
    size = 1 if world_size is None else world_size
    if not isinstance(size, int) or size < 1 or not 0 <= rank < size:
        raise SpecError(f"rank={rank!r} of world_size={world_size!r} is not allowed; 0 <= rank < world_size")
    for name, degree in (("tp", tp), ("ep", ep)):
        if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
            raise SpecError(f"{name}={degree!r} is not allowed; it is a whole number >= 1")
    if size % ep or (deepspeed is not None and tp * ep > 1):
        raise SpecError(
            f"ep={ep} takes its ranks from world_size={size}, which it has to divide; DeepSpeed has neither"
        )
    items = _items(model_or_shapes)
    parameters = _tensor_specs(items, dtype)
    spec = spec.for_names([name for name, _ in parameters])
    of_kind = kinds(model_or_shapes)
    hyper = {rule: spec.resolve(rule=rule) for rule in spec.rule_names}
    shapes = {name: tensor.shape for name, tensor in parameters}

    def h(name: str) -> dict[str, Any]:
        rule = spec.rule_for(name, shapes.get(name, ()), of_kind.get(name, ""))
        return {**hyper[rule], "rule": rule} if spec.is_mixed else hyper[rule]

    if spec.is_mixed:  # as the optimizer's groups have them
        order = {rule: i for i, rule in enumerate(spec.rule_names)}
        parameters = sorted(parameters, key=lambda one: order[h(one[0])["rule"]])
    if deepspeed is None:
        partition = PARTITIONS[spec.partition]
        here = held_here(partition, items) if world_size is None else {}
        if tp * ep > 1:
            from memopt.layout.model_parallel import cut_rows

            here = {**cut_rows(partition, shapes, rank, size, tp, ep), **here}
        owned = [
            (name, here[name] if name in here else partition.rows(tensor.shape, rank, size), tensor.dtype)
            for name, tensor in parameters
        ]
    else:
        from memopt.layout.flattened import rows_of_rank

        ordered = {name: shapes[name] for name, _ in parameters}
        rules = {name: spec.rule_of(h(name)) for name in ordered}
        found = rows_of_rank(spec, ordered, rank, size, deepspeed, rules)
        owned = [(name, rows, "float32") for name, rows in found]
    lines: list[Line] = []
    for name, rows, kind in owned:
        lines += resolve_layout(spec, h(name), name, 0, rows, kind).lines(device, capturable)
    shared = ENGINES[spec.engine].shared_lines(lines)
    return Ledger([*lines, *shared, *workspace_lines(spec, h, owned, device)])


def workspace_lines(
    spec: OptimSpec, h: Callable[[str], Mapping[str, Any]], owned: list[tuple[str, Rows, str]], device: str
) -> list[Line]:
    """What placements allocate besides the state to step these rows of parameters; ``h(name)`` are their
    hyperparameters."""
    streaming = [p for p in sorted(spec.placements) if type(PLACEMENTS[p]).workspace is not Placement.workspace]
    if not streaming:
        return []
    from memopt.placements.stores.by_placement import chunked
    from memopt.spec.placement_options import of_placement

    lines = []
    cached: dict[Any, ChunkedState] = {}  # a name matters through overrides alone
    for name in streaming:
        mine = []
        for n, rows, dtype in owned:
            place = spec.for_parameter(n)[1]
            if place == name:
                own = h(n)
                rule = spec.rule_of(own)
                key = (rule, spec.format_for(n, rule), place, rows, dtype)
                mine.append(
                    cached.get(key) or cached.setdefault(key, chunked(resolve_layout(spec, own, n, 0, rows, dtype)))
                )
        lines += PLACEMENTS[name].workspace(mine, device, of_placement(spec.options, name))
    return lines


def spec_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords sorted into the fields of a spec: options of placements, and else hyperparameters."""
    fields = {k: v for k, v in given.items() if k in FIELDS}
    options = {k: v for k, v in given.items() if k in OPTIONS}
    hyper = {k: v for k, v in given.items() if k not in fields and k not in options}
    for name, found in (("hyper", hyper), ("options", options)):
        if found:
            fields[name] = {**fields.get(name, {}), **found}
    return fields


def held_here(partition: type[Partition], items: Iterable[tuple[str, Any]]) -> dict[str, Rows]:
    """The rows that this process holds, by name, of parameters that torch has sharded."""
    items = list(items)
    if not any(hasattr(p, "placements") for _, p in items):
        return {}
    from memopt.partitions.fsdp import Sharded

    if not issubclass(partition, Sharded):
        return {}
    live = partition()
    return {name: live.local_rows(p) for name, p in items}


def named_tensors(source: Any, dtype: str = "bfloat16") -> list[tuple[str, TensorSpec]]:
    """``(name, tensor)`` of every parameter of a model, a mapping or an iterable; ``dtype`` is that of bare shapes."""
    return _tensor_specs(_items(source), dtype)


def _tensor_specs(items: Iterable[tuple[str, Any]], dtype: str) -> list[tuple[str, TensorSpec]]:
    if dtype not in ITEMSIZE:
        raise SpecError(f"dtype={dtype!r} is not allowed; it is one of {', '.join(ITEMSIZE)}")
    found = []
    for name, value in items:
        shape = getattr(value, "shape", value)
        if not all(isinstance(n, int) and n >= 0 for n in shape):
            raise SpecError(f"{name}: {shape!r} is not a shape; a shape is a tuple of integers >= 0")
        found.append((name, _tensor(value, shape, dtype)))
    return found


def _items(source: Any) -> list[tuple[str, Any]]:
    """``(name, tensor or shape)`` of all that is not frozen; what has no name has its number."""
    if hasattr(source, "named_parameters"):
        source = source.named_parameters()
    found: list[tuple[str, Any]] = []
    for i, item in enumerate(source.items() if isinstance(source, Mapping) else source):
        named = not hasattr(item, "shape") and isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
        found.append(item if named else (str(i), item))
    names = clean_names(name for name, _ in found)
    return [(name, value) for name, (_, value) in zip(names, found, strict=True) if not _is_frozen(value)]


def _is_frozen(value: Any) -> bool:
    """Whether it is a parameter that requires no gradient; any other tensor stands for its shape."""
    if getattr(value, "requires_grad", True):
        return False
    from torch.nn import Parameter

    return isinstance(value, Parameter)


def _tensor(value: Any, shape: Any, dtype: str) -> TensorSpec:
    return TensorSpec(str(getattr(value, "dtype", dtype)).removeprefix("torch."), tuple(shape))
