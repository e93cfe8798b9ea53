"""Degrees of parallelism: what goes with what. ``training`` is an :class:`estimators.training.Training`."""

from typing import Any

from estimators.errors import InputError, shown

#: The fields of :class:`estimators.training.Training` that are degrees, and the most each may be.
DEGREES = {"tp": 1024, "pp": 1024, "cp": 1024, "ep": 1024, "replicas": 2**16}
#: Orders in which a rank of a pipeline runs its micro-batches; ``interleaved-V``: each rank has V chunks of layers.
SCHEDULES = ("1f1b", "gpipe", *(f"interleaved-{v}" for v in range(2, 33)))


def several(training: Any) -> bool:
    """Whether there is more than data parallelism."""
    return any(getattr(training, name) > 1 for name in DEGREES)


def chunks(training: Any) -> int:
    """Chunks of layers on each rank of the pipeline."""
    return int(training.schedule.partition("-")[2] or 1)


def sharing(training: Any, world_size: int) -> int:
    """Ranks that share what is sharded: data-parallel and context-parallel ones, of one replica.

    Raises :class:`InputError`.
    """
    ranks = world_size * training.cp
    for name, of in (("replicas", world_size), ("ep", ranks // training.replicas)):
        if of % getattr(training, name):
            raise InputError(
                f"{name}={getattr(training, name)} is not allowed: it has to divide the {of} ranks there are"
            )
    return int(ranks // training.replicas)


def cards(training: Any, world_size: int) -> int:
    """GPUs in all."""
    return int(world_size * training.tp * training.pp * training.cp)


def communicators(training: Any, shards: int) -> int:
    """Groups of ranks that a rank talks to, each with buffers of NCCL's. ``shards``: ranks that share what is
    sharded."""
    return sum(n > 1 for n in (shards, training.tp, training.pp, training.cp, training.ep, training.replicas))


def contradictions(t: Any) -> tuple[tuple[bool, str], ...]:
    """``(whether, sentence)`` of what does not go together."""
    given = [name for name in DEGREES if getattr(t, name) > 1]
    listed = ", ".join(f"{name}={getattr(t, name)}" for name in given)
    cut = [name for name in given if name in ("tp", "pp", "cp", "ep")]
    return (
        (bool(given and t.deepspeed), f"{listed} does not go with deepspeed, of which ZeRO alone is known here"),
        (
            bool(cut and (t.lora or t.reference_model)),
            f"{listed}: adapters and reference models are not known cut by {', '.join(cut)}",
        ),
        (
            t.pp > 1 and bool(t.seq) and t.accumulate < t.pp,
            f"pp={t.pp} needs accumulate={t.pp} or more: torch's schedules have at least as many micro-batches in a "
            "step as there are stages",
        ),
        (t.schedule != "1f1b" and t.pp == 1, f"schedule={t.schedule!r} is a pipeline's, and pp is 1"),
        (t.regather and t.tp == 1, "regather is for tensor parallelism, and tp is 1"),
        (
            t.cp > 1 and t.attention == "eager",
            f"cp={t.cp} needs attention='sdpa' or 'flash': eager attention does not go round a ring",
        ),
        (t.cp > 1 and t.packed, f"cp={t.cp} does not go with packed: torch's ring of attention takes no mask"),
        (t.cp > 1 and bool(t.seq) and t.seq % t.cp > 0, f"seq={t.seq} is not a multiple of cp={t.cp}"),
        (
            t.tp > 1 and bool(t.seq) and (t.seq // t.cp) % t.tp > 0,
            f"{t.seq // max(1, t.cp)} tokens of a sequence are not a multiple of tp={t.tp}, which cuts them further",
        ),
        (
            t.pp > 1 and t.offload_params,
            f"pp={t.pp} does not go with offload_params: weights stay gathered in a pipeline",
        ),
    )


def check_partition(training: Any, partition: str, spec: Any) -> None:
    """Raises :class:`InputError` where a spec's partition has nothing that replicas could hold."""
    if training.replicas > 1 and partition not in ("zero2", "zero3"):
        raise InputError(
            f"replicas={training.replicas} is FSDP2's hybrid sharding, and {shown(str(spec))} shards nothing that way; "
            "name a spec with /zero2 or /zero3"
        )
