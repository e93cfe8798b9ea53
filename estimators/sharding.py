"""Bytes per rank of weights, gradients and state under ZeRO and FSDP, as figures: specs that shard more than the state
cannot be built yet, so an estimate does not use these.

N is parameters, w ranks. Mixed precision with Adam keeps 2 bytes of weights and 2 of gradients per parameter and 12 of
state: the fp32 master copy and two moments (Rajbhandari et al., "ZeRO", section 3.1).
"""

from __future__ import annotations

from estimators.fields import InputError, shown

#: Bytes per parameter in mixed precision: weights, gradients, state.
MIXED = (2, 2, 12)
#: DeepSpeed's default bucket for all-gathers and reduces of stages 1 and 2, elements.
BUCKET = 5 * 10**8
#: Stage 3's defaults: parameters of up to this many elements stay whole; elements alive at once and prefetched.
PERSISTENT, LIVE, PREFETCH = 10**5, 10**9, 5 * 10**7


def zero(stage: int, parameters: int, ranks: int, per_parameter: tuple[int, int, int] = MIXED) -> int:
    """Bytes on one rank, without buckets: what the paper's table 1 has.

    >>> [round(zero(stage, 7_500_000_000, 64) / 1e9, 1) for stage in (0, 1, 2, 3)]
    [120.0, 31.4, 16.6, 1.9]
    """
    if stage not in (0, 1, 2, 3):
        raise InputError(f"stage={shown(stage)} is not allowed; ZeRO has the stages 0 to 3")
    weights, gradients, state = per_parameter
    shared = (stage >= 3) * weights + (stage >= 2) * gradients + (stage >= 1) * state
    whole = weights + gradients + state - shared
    return whole * parameters + -(-shared * parameters // ranks)


def fsdp2(shapes: list[tuple[int, ...]], ranks: int, itemsize: int = 2) -> int:
    """Bytes of one rank's share of these parameters under FSDP2: dimension 0 is cut into ``ranks`` chunks of equal
    rows, the last ones short or empty; a rank's tensor is padded to the first rank's.

    >>> fsdp2([(5, 4)], 2, 4), fsdp2([(3,)], 8, 4)
    (48, 4)
    """
    total = 0
    for shape in shapes:
        rows, cols = (shape[0], 1) if shape else (1, 1)
        for n in shape[1:]:
            cols *= n
        total += -(-rows // ranks) * cols * itemsize
    return total


def gathered(layer: int, itemsize: int = 2) -> int:
    """What FSDP2 holds beside the shards: the layer at work and the next one, prefetched, whole."""
    return 2 * layer * itemsize


def buckets(stage: int, *, overlap: bool = True, itemsize: int = 2) -> int:
    """DeepSpeed's communication buffers with its defaults: one bucket, two with overlap; at stage 3 one more for what
    is prefetched.

    >>> buckets(2), buckets(0)
    (2000000000, 0)
    """
    if stage == 0:
        return 0
    return ((2 if overlap else 1) * BUCKET + (PREFETCH if stage == 3 else 0)) * itemsize
