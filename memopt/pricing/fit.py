"""The gentlest mixed assignment of formats, or of places, to parameters within a budget of state bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from memopt.core.hyperparameters import SpecError
from memopt.core.ledger import TensorSpec
from memopt.pricing.offload_share import offload_share, quoted
from memopt.pricing.price import named_tensors, price, spec_fields
from memopt.spec import OptimSpec, parse
from memopt.spec.placement_options import size

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from memopt.keywords import SpecKeywords

#: Formats, from 4 bytes for a moment down to half a byte a parameter. How far updates are from those of fp32 on noise,
#: bursts, a spread of a hundred and heavy tails, in this order (``benchmarks/results/fidelity.md``): 8bit 0.07, 0.02,
#: 0.09, 0.08; 8bit.4bit 0.29, 0.18, 0.30, 0.28; 8bit.factored 0.03, 0.26, 0.07, 1.76; 4bit 0.43, 0.30, 1.09, 0.52;
#: 4bit.factored 0.30, 0.33, 1.03, 1.98. What is factored beside 8 bits takes less than 4bit and is nearer on all of
#: these but heavy tails, and stands before it. A rung that would not save anything for a parameter is passed over, as
#: what is factored is for a vector, and one that the rule does not have is left out.
LADDER = ("32bit", "8bit", "8bit.4bit", "factored", "8bit.factored", "4bit", "4bit.factored")


def fit(
    model_or_shapes: Any,
    budget: int | str,
    spec: str | OptimSpec = "adamw",
    *,
    offload: str | None = None,
    **fields: Unpack[SpecKeywords],
) -> OptimSpec:
    """The spec, with overrides, whose state is at most ``budget`` and that changes least.

    Every parameter begins in 32 bits. Parameters are then moved to 8 bits until the budget holds, the largest first,
    because a large matrix saves most per parameter that is changed; then, with the first moment in 8 bits, to a second
    moment in 4 bits, then to a factored one; then to 4 bits, then beside a factored second moment. Embeddings move last
    on every rung: their rows are updated rarely, and a second moment that is rarely written is what low precision harms
    most. The result is exact: its price, by the ledger the optimizer allocates from, is within the budget, and with the
    parameter that was moved last left where it was it is not.

    With ``offload`` every format stays what the spec says, and the budget is the device's: the state of as many
    parameters as it takes goes to the host, the largest first as long as all of one is needed, then the smallest that
    is enough. By the ledger state and buffers on the device are within the budget, and with any of these parameters
    left on the device they are not.

    Args:
        model_or_shapes: A model, a mapping from name to shape, or an iterable of shapes or ``(name, shape)`` pairs.
        budget: Bytes of optimizer state (workspaces are not counted), or a size such as ``"12GiB"``; with ``offload``
            bytes of state and of workspaces on the device.
        spec: Rule, master, placement, partition and the rest; its format is chosen here, unless there is an
            ``offload``.
        offload: Where state goes that does not fit the device: ``"cpu"``, ``"host"`` or ``"disk"``. Default None:
            formats are chosen instead.
        fields: Hyperparameters, placement options and fields of :class:`OptimSpec`, as of :func:`memopt.create`.

    Returns:
        An :class:`OptimSpec` for :func:`memopt.create`: the commonest format, and overrides by name.

    Raises:
        SpecError: if even the last rung (with ``offload``: no state on the device) does not fit, for a spec with
            overrides, and for values that are not allowed.

    >>> shapes = {"embed.weight": (1000, 512), "a.weight": (512, 512), "b.weight": (512, 512)}
    >>> fit(shapes, "100MiB")
    OptimSpec('adamw')
    >>> fit(shapes, 6_300_000)
    OptimSpec('adamw-8bit', overrides={'embed.weight': '32bit'})
    >>> fit(shapes, 6_300_000, offload="cpu")
    OptimSpec('adamw', overrides={'b.weight': '@cpu'})
    """
    limit = size(budget, "budget")
    if offload is not None:
        return offload_share(model_or_shapes, limit, spec, offload, fields)
    base = parse(spec, **spec_fields(fields))
    if base.overrides:
        raise SpecError("fit chooses the overrides itself; give a spec without any")
    base = base.replace(format=LADDER[0])
    tensors = named_tensors(model_or_shapes)
    rungs = [fmt for fmt in LADDER if _allowed(base, fmt)]
    costs = _Costs(base, rungs)
    rung_of = {name: 0 for name, _ in tensors}
    total = sum(costs(tensor, 0) for _, tensor in tensors)
    for rung in range(1, len(rungs)):
        if total <= limit:
            break
        total = _descend(tensors, rung_of, rung, costs, total, limit)
    if total > limit:
        raise SpecError(
            f"the state does not fit into {limit:,} bytes; the least that {base.rule} needs is {total:,}; "
            "a rule with less state is lion"
        )
    return _spec(base, rung_of, rungs)


def _allowed(base: OptimSpec, fmt: str) -> bool:
    try:
        base.replace(format=fmt).resolve()
    except SpecError:
        return False
    return True


class _Costs:
    """Bytes of the state of one parameter of a shape and dtype on a rung."""

    def __init__(self, base: OptimSpec, rungs: list[str]) -> None:
        self._specs = [base.replace(format=fmt) for fmt in rungs]
        self._cached: dict[tuple[TensorSpec, int], int] = {}

    def __call__(self, tensor: TensorSpec, rung: int) -> int:
        key = (tensor, rung)
        if key not in self._cached:
            lines = price({"p": tensor}, self._specs[rung])
            self._cached[key] = sum(line.nbytes for line in lines if line.lifetime != "workspace")
        return self._cached[key]


def _descend(
    tensors: list[tuple[str, TensorSpec]], rung_of: dict[str, int], rung: int, costs: _Costs, total: int, limit: int
) -> int:
    """Move parameters to ``rung`` until the budget holds; those that gain nothing there stay where they are."""

    def gain(tensor: TensorSpec, name: str) -> int:
        return costs(tensor, rung_of[name]) - costs(tensor, rung)

    order = sorted(tensors, key=lambda item: ("embed" in item[0] or "wte" in item[0], -gain(item[1], item[0])))
    for name, tensor in order:
        if total <= limit:
            break
        if gain(tensor, name) > 0:
            total -= gain(tensor, name)
            rung_of[name] = rung
    return total


def _spec(base: OptimSpec, rung_of: Mapping[str, int], rungs: list[str]) -> OptimSpec:
    """The most common rung is the spec's format, the others are overrides by name."""
    used = list(rung_of.values())
    common = max(range(len(rungs)), key=lambda rung: (used.count(rung), -rung))
    overrides = {quoted(name): rungs[rung_of[name]] for name in rung_of if rung_of[name] != common}
    return base.replace(format=rungs[common], overrides=overrides)
