"""Bytes per rank of weights, gradients and state under ZeRO and FSDP: what an estimate holds for ``/zero2`` and
``/zero3`` beside this rank's rows, and the figures of the paper and of DeepSpeed.

N is parameters, w ranks. Mixed precision with Adam keeps 2 bytes of weights and 2 of gradients per parameter and 12 of
state: the fp32 master copy and two moments (Rajbhandari et al., "ZeRO", section 3.1).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from estimators.errors import InputError, shown

#: A block's place in a stack: everything up to the first number that stands alone in a name.
_BLOCK = re.compile(r".*?(?:^|\.)\d+\.")

#: Bytes per parameter in mixed precision: weights, gradients, state.
MIXED = (2, 2, 12)
#: DeepSpeed's defaults of stage 3: parameters of up to this many elements stay whole; elements alive at once.
PERSISTENT, LIVE = 10**5, 10**9


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


def gathered(sizes: Iterable[tuple[str, int]], *, reshard: bool) -> int:
    """What FSDP2 holds whole in a forward and backward pass, beside the shards, of ``(name, bytes)``: everything
    (``/zero2``), or what is in no block, the block at work and the next one, prefetched (``/zero3``).

    >>> layers = [("embed", 10), ("h.0.w", 4), ("h.0.b", 1), ("h.1.w", 4), ("h.1.b", 1)]
    >>> gathered(layers, reshard=False), gathered(layers, reshard=True)
    (20, 20)
    """
    root, blocks = _grouped(sizes)
    return root + (sum(sorted(blocks)[-2:]) if reshard else sum(blocks))


def unreduced(sizes: Iterable[tuple[str, int]]) -> int:
    """Whole gradients in a backward pass: those of the largest of the blocks and what is in none, and the copy in which
    they are reduced and scattered.

    >>> unreduced([("embed", 10), ("h.0.w", 4), ("h.0.b", 1)])
    20
    """
    return 2 * largest_block(sizes)


def largest_block(sizes: Iterable[tuple[str, int]]) -> int:
    """Bytes of the largest of the blocks and what is in none."""
    root, blocks = _grouped(sizes)
    return max([root, *blocks])


def block_of(name: str) -> str:
    """The numbered block that a parameter is in, by its name; empty where it is in none.

    >>> block_of("model.layers.12.mlp.up_proj.weight"), block_of("lm_head.weight")
    ('model.layers.12.', '')
    """
    found = _BLOCK.match(name)
    return found[0] if found else ""


def _grouped(sizes: Iterable[tuple[str, int]]) -> tuple[int, list[int]]:
    """Bytes in no numbered block, and of each block."""
    root = 0
    blocks: dict[str, int] = {}
    for name, nbytes in sizes:
        block = block_of(name)
        if block:
            blocks[block] = blocks.get(block, 0) + nbytes
        else:
            root += nbytes
    return root, list(blocks.values())
