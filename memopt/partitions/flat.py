"""Parameters that another library has flattened and shares out: DeepSpeed's partitions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, final

from memopt.geometry import Rows, Shape
from memopt.hyper import SpecError
from memopt.layout.param import resolve
from memopt.partitions.base import Entry, Partition
from memopt.rules import RULES

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.partitions.recovering import Made
    from memopt.spec import OptimSpec


@final
class Flat(Partition):
    """Every rank has vectors of its own, made of parts of many parameters. They are stepped as they are, in blocks of
    256 elements, with rules and formats that look at single elements or blocks of them. Not a value of a spec: the
    optimizer finds itself on it."""

    name = "flat"
    summary = "flat vectors in place of the parameters, shared out by DeepSpeed"
    is_flattened = True

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[Tensor] = []  # in the order in which DeepSpeed has shown them

    @staticmethod
    def rows(shape: Shape, rank: int, world_size: int) -> Rows:
        return Rows.whole(shape)

    def entries(self, groups: Iterable[dict[str, Any]]) -> Iterator[Entry]:
        """DeepSpeed steps groups and sub-groups one by one: a vector keeps its number as its name."""
        for group in groups:
            for p in group["params"]:
                known = [i for i, q in enumerate(self._seen) if q is p]
                if not known:
                    self._seen.append(p)
                yield str(known[0] if known else len(self._seen) - 1), p, group

    def agree(self, bad: list[str], parameters: Sequence[Tensor]) -> list[str]:
        return self.anywhere(bad, "cpu")

    def refuse_conversion(self, spec: OptimSpec) -> None:
        reason = needs_shapes(spec)
        if reason:
            raise SpecError(
                f"convert_ cannot go to '{spec}', which {reason}, while the state is of DeepSpeed's flat "
                "vectors: make the optimizer with it"
            )


def are_vectors(made: Sequence[Made], now: Sequence[Tensor]) -> bool:
    """Whether what stands in the groups ``now`` are DeepSpeed's vectors in the place of what the optimizer was made
    with, and not what was put there by its owner."""
    from memopt.partitions.recovering import is_flattened

    flat = {one.shape for one in made if len(one.shape) == 1}
    vectors = any(tuple(p.shape) not in flat for p in now) and all(p.dim() == 1 for p in now)
    known = {id(one.parameter()) for one in made} & {id(p) for p in now}
    return (vectors and not known and any(len(one.shape) > 1 for one in made)) or is_flattened(made)


def flattened(spec: OptimSpec, made: Sequence[Made]) -> Partition:
    """The partition on which an optimizer goes on whose parameters DeepSpeed has replaced by vectors: :class:`Flat`, or
    where the rule or the format needs the shapes :class:`~memopt.partitions.fragments.Fragments`. Raises RuntimeError
    where these cannot be recovered."""
    from memopt.partitions.fragments import Fragments
    from memopt.partitions.recovering import Unknown, recover

    if spec.partition != "none":
        raise RuntimeError(
            f"'{spec}' shards by itself, and DeepSpeed has put flat vectors in the place of the "
            f"parameters: its stage takes the place of /{spec.partition}"
        )
    if spec.options.get("offload_gradients"):
        raise RuntimeError(
            f"'{spec}' with offload_gradients takes gradients that DeepSpeed is to reduce; leave it "
            "out, and use DeepSpeed's offload_optimizer"
        )
    reason = needs_shapes(spec)
    if not reason:
        return Flat()
    try:
        return Fragments(recover(made))
    except Unknown as unknown:
        raise RuntimeError(
            f"the parameters were replaced by flat vectors (DeepSpeed does so), '{spec}' {reason}, and they cannot be "
            f"recovered: {unknown}; use an element-wise rule such as adamw-8bit, or FSDP2: '/zero3'"
        ) from unknown


def needs_shapes(spec: OptimSpec) -> str | None:
    """Why a spec cannot step flat vectors in place of the parameters without knowing what is in them; None where it
    can."""
    if spec.overrides:
        return "has overrides by name, and flat vectors have none"
    if not RULES[spec.rule].element_wise:
        return f"needs the parameters' shapes: {spec.rule} takes statistics of whole tensors"
    layout = resolve(spec, spec.resolve(), "", 0, Rows.whole((4096, 4096)), "float32")
    held = {m.format.name for m in layout.moments}
    whole = held & {"factored", "rowmean"}
    return f"needs the parameters' shapes: a moment is held as {whole.pop()}" if whole else None
