"""How 16-bit parameters keep what an update is too small to touch, one file each. ``MASTERS`` is the axis."""

from memopt.masters.base import LOW_PRECISION, Master, master_of
from memopt.masters.fp32 import FP32Copy
from memopt.masters.kahan import Kahan
from memopt.masters.rounded import Rounded
from memopt.masters.split import Split, Split16
from memopt.masters.stochastic import Stochastic

MASTERS: dict[str, Master] = {
    m.name: m for m in (Rounded(), FP32Copy(), Kahan(), Stochastic(), Split(), Split16())
}  # fmt: skip

__all__ = ["LOW_PRECISION", "MASTERS", "Master", "master_of"]
