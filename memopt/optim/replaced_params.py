"""Parameters that another tool has replaced by flat vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memopt.layout.flattened import needs_shapes, refuse_deepspeed
from memopt.partitions.deepspeed.flat import Flat

if TYPE_CHECKING:
    from torch import Tensor

    from memopt.partitions import Partition
    from memopt.partitions.deepspeed.metadata import Made
    from memopt.spec import OptimSpec


def are_vectors(made: Sequence[Made], now: Sequence[Tensor]) -> bool:
    """Whether what stands in the groups ``now`` are DeepSpeed's vectors in the place of what the optimizer was made
    with, and not what was put there by its owner."""
    from memopt.partitions.deepspeed.metadata import is_flattened

    flat = {one.shape for one in made if len(one.shape) == 1}
    vectors = any(tuple(p.shape) not in flat for p in now) and all(p.dim() == 1 for p in now)
    alive = [p for one in made if (p := one.parameter()) is not None]  # DeepSpeed's engine holds the model, so all are
    both = {id(p) for p in alive} & {id(p) for p in now}
    replaced = vectors and not both and len(alive) == len(made) and any(len(one.shape) > 1 for one in made)
    return replaced or is_flattened(made)


def flattened(spec: OptimSpec, made: Sequence[Made], groups: Sequence[dict[str, Any]]) -> Partition:
    """The partition on which an optimizer of these ``groups`` goes on whose parameters DeepSpeed has replaced by
    vectors: :class:`Flat`, or where the rule or the format needs the shapes
    :class:`~memopt.partitions.deepspeed.fragments.Fragments`. Raises RuntimeError where these cannot be recovered."""
    from memopt.partitions.deepspeed.fragments import Fragments
    from memopt.partitions.deepspeed.metadata import Unknown, recover, refuse

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
    if wrong := refuse(made, groups):
        raise RuntimeError(wrong)
    if refused := refuse_deepspeed(spec):
        raise RuntimeError(f"'{spec}' is not for DeepSpeed's vectors: {refused}; use FSDP2: '/zero3'")
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
