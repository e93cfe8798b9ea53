"""Moments as they are, in two halves: 16 bits of bf16 and 16 bits of what it lacks. Four bytes."""

from typing import final

from memopt.core.ledger import TensorSpec
from memopt.formats.base import Format, too_small


@final
class Half(Format):
    """``high`` and ``low``, bf16 in the parameter's shape."""

    name = "toyhalf"
    summary = "a format of a test, 4 bytes per element"

    def declines(self, moment, shape):
        return too_small(shape)

    def layout(self, moment, rows):
        return {part: TensorSpec("bfloat16", rows.local_shape) for part in ("high", "low")}

    def read(self, parts, moment, shard):
        return parts["high"].float() + parts["low"].float()

    def write(self, x, parts, moment, shard, floor=0.0):
        parts["high"].copy_(x)
        parts["low"].copy_(x - parts["high"].float())
        return x
