"""How 16-bit parameters keep what an update is too small to touch, one file each. ``MASTERS`` is the axis."""

from memopt.axis import Axis
from memopt.masters.base import LOW_PRECISION, Master, master_of

MASTERS: Axis[Master] = Axis(
    "memopt.masters",
    {
        "none": "rounded.Rounded",
        "fp32": "fp32.FP32Copy",
        "kahan": "kahan.Kahan",
        "stochastic": "stochastic.Stochastic",
        "split": "split.Split",
        "split16": "split.Split16",
    },
    lambda kind: kind(),
)

__all__ = ["LOW_PRECISION", "MASTERS", "Master", "master_of"]
