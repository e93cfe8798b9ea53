"""State of optimizers that memopt does not run, for comparison: torchao's AdamW in 8 bits, 4 bits and fp8.

Read in torchao/optim/subclass_*.py (0.18). A parameter of n elements, n >= 4096 and a multiple of the block, has two
moments of codes, an fp32 scale per block and, but for fp8, two maps of its own; any other has both moments in its own
dtype. Every parameter has a step of 4 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

from estimators.fields import InputError, shown

_LEAST, _STEP = 4096, 4


class Kind(NamedTuple):
    """Elements of a block, bits of a code, bytes of the two maps."""

    block: int
    bits: int
    maps: int


TORCHAO = {"8bit": Kind(256, 8, 2 * 256 * 4), "4bit": Kind(128, 4, 2 * 16 * 4), "fp8": Kind(256, 8, 0)}


def torchao_nbytes(shapes: Iterable[tuple[int, ...]], kind: str, itemsize: int = 2) -> int:
    """Bytes of torchao's AdamW over parameters of these shapes and this itemsize.

    >>> torchao_nbytes([(4096, 4096), (4096,)], "8bit")
    34091144
    """
    if kind not in TORCHAO:
        raise InputError(f"kind={shown(kind)} is not allowed; it is one of {', '.join(TORCHAO)}")
    block, bits, maps = TORCHAO[kind]
    total = 0
    for shape in shapes:
        n = prod(shape)
        if n >= _LEAST and n % block == 0:
            total += 2 * n * bits // 8 + 2 * 4 * (n // block) + maps + _STEP
        else:
            total += 2 * n * itemsize + _STEP
    return total
