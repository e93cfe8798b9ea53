"""Which elements of which parameter lie where in DeepSpeed's flat vectors: from the metadata on the parameters.

Stages 1 and 2 and the bf16 optimizer put all parameters of a group one after the other and cut the whole into one
vector per rank; every parameter says where this rank's fragment of it is (``_hp_mapping``, deepspeed's
runtime/zero/stage_1_and_2.py, runtime/bf16_optimizer.py, utils/tensor_fragment.py), and its weights are views of the
whole. Stage 3 cuts every parameter by itself, and a vector is made of the parts of one sub-group (``_z3_optimizer``,
runtime/zero/stage3.py). Read in DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from memopt.core.rows import Shape
from memopt.partitions.deepspeed.fragments import Origin
from memopt.partitions.deepspeed.spans import Span, spans_of_parameter, spans_of_vector

if TYPE_CHECKING:
    from weakref import ref

    from torch import Tensor


class Made(NamedTuple):
    """A parameter that the optimizer was made with."""

    name: str
    parameter: ref[Tensor]
    shape: Shape
    group: dict[str, Any]


class Unknown(Exception):
    """Why the parameters behind the vectors cannot be found."""


def is_flattened(made: Sequence[Made]) -> bool:
    """Whether DeepSpeed has put vectors in the place of these parameters."""
    found = (one.parameter() for one in made)
    return any(hasattr(p, "_hp_mapping") or hasattr(p, "_z3_optimizer") for p in found if p is not None)


def cannot_keep(zero: Any) -> str | None:
    """Why DeepSpeed's optimizer of a ZeRO stage cannot have one of ours within it, or None."""
    if getattr(zero, "elastic_checkpoint", False):
        return "DeepSpeed's elastic_checkpoint cuts codes and scales as if they were flat moments; set it to false"
    if getattr(zero, "swap_optimizer", False):
        return (
            "DeepSpeed's offload_optimizer to nvme writes and reads fp32 vectors, and the state here may be codes and "
            "scales; offload to cpu, or leave offload_optimizer out and give the spec '@disk'"
        )
    return None


def refuse(made: Sequence[Made], groups: Sequence[dict[str, Any]]) -> str | None:
    """Why what DeepSpeed has made of the parameters cannot be stepped, whatever the rule and the format; or None."""
    if any(group.get("moe") for group in groups):
        return (
            "DeepSpeed's groups of experts ('moe': True) are cut and reduced over ranks of their own, which is not "
            "supported; make the optimizer without split_params_into_different_moe_groups_for_optimizer, or shard "
            "experts by FSDP2: '/zero3'"
        )
    for one in made:
        p: Any = one.parameter()
        zero = getattr(p, "_z3_optimizer", None) or getattr(p, "_zero_optimizer", None)
        if zero is not None:
            return cannot_keep(zero)
    return None


def recover(made: Sequence[Made]) -> list[Origin]:
    """Where each parameter lies on this rank and on the others. Raises :class:`Unknown`."""
    parameters: list[Any] = [one.parameter() for one in made]
    for one, p in zip(made, parameters, strict=True):
        if p is None:
            raise Unknown(f"{one.name} does not exist any more")
        if getattr(p, "tensor_model_parallel", False) or getattr(p, "model_parallel", False):
            raise Unknown(f"{one.name} is cut by tensor parallelism, and its statistics would be of a part of it")
    if any(hasattr(p, "_z3_optimizer") for p in parameters):
        return _of_stage_3(made, parameters)
    if any(hasattr(p, "_hp_mapping") for p in parameters):
        return [origin for group in _groups(made) for origin in _of_vector(group)]
    raise Unknown("they carry no metadata of DeepSpeed's")


def _groups(made: Sequence[Made]) -> list[list[Made]]:
    found: dict[int, list[Made]] = {}
    for one in made:
        found.setdefault(id(one.group), []).append(one)
    return list(found.values())


def _of_vector(made: Sequence[Made]) -> list[Origin]:
    """The parameters of one group, of which every rank has one vector."""
    import torch.distributed as dist

    group = made[0].group
    trained: list[Any] = [p for p in (one.parameter() for one in made) if p is not None and hasattr(p, "_hp_mapping")]
    if not trained:
        return [Origin(one.name, one.shape, one.group) for one in made]
    if len(group["params"]) != 1:
        raise Unknown(f"a group has {len(group['params'])} vectors, and one was expected")
    flat, process_group = group["params"][0], trained[0]._dp_group
    rank, world_size, share = dist.get_rank(process_group), dist.get_world_size(process_group), flat.numel()
    storage = trained[0].detach().untyped_storage()
    itemsize = trained[0].element_size()
    together = all(p.detach().untyped_storage().data_ptr() == storage.data_ptr() for p in trained)
    if not together or storage.nbytes() != share * world_size * itemsize:
        raise Unknown("the weights of a group are not one after the other in one vector for all ranks")
    found = []
    for one in made:
        p: Any = one.parameter()
        if not hasattr(p, "_hp_mapping"):
            found.append(Origin(one.name, one.shape, group))
            continue
        spans = spans_of_vector(p.numel(), p.storage_offset(), share, world_size)
        at = max(p.storage_offset() - rank * share, 0) if spans[rank].numel else 0
        here = spans[rank] if spans[rank].numel else Span(0, 0)
        if _mapped(p) != (here, at):
            raise Unknown(f"DeepSpeed's map of {one.name} is not where its weights are (round_robin_gradients)")
        found.append(Origin(one.name, tuple(p.shape), group, flat, at, spans, rank, process_group))
    return found


def _mapped(p: Any) -> tuple[Span, int]:
    """Which elements of the parameter DeepSpeed says are here, and where in the vector."""
    if p._hp_mapping is None:
        return Span(0, 0), 0
    here, there = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
    return Span(here.start, here.start + here.numel), there.start


def _of_stage_3(made: Sequence[Made], parameters: Sequence[Any]) -> list[Origin]:
    import torch.distributed as dist

    zero = next(p._z3_optimizer for p in parameters if hasattr(p, "_z3_optimizer"))
    if getattr(zero, "swap_optimizer", False):
        raise Unknown("DeepSpeed keeps them in files (offload_optimizer to nvme)")
    where: dict[int, tuple[int, int]] = {}
    for i, sub_group in enumerate(zero.fp16_groups):
        at = 0
        for p in sub_group:
            where[id(p)] = i, at
            at += p.partition_numel()
        if at != zero.fp32_partitioned_groups_flat[i].numel():
            raise Unknown(f"the parts of sub-group {i} have {at} elements, and its vector has another number")
    found = []
    for one, p in zip(made, parameters, strict=True):
        if id(p) not in where:
            found.append(Origin(one.name, one.shape, one.group))
            continue
        i, at = where[id(p)]
        process_group = zero.sub_group_process_groups[i]
        spans = spans_of_parameter(p.ds_numel, dist.get_world_size(process_group))
        if spans[0].numel != p.partition_numel():
            raise Unknown(f"{one.name} is not cut evenly")
        found.append(
            Origin(
                one.name,
                tuple(p.ds_shape),
                one.group,
                zero.fp32_partitioned_groups_flat[i],
                at,
                spans,
                dist.get_rank(process_group),
                process_group,
            )
        )
    return found
