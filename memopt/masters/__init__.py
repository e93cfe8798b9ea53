"""How 16-bit parameters keep what an update is too small to touch, one file each. ``MASTERS`` is the axis."""

from memopt.core import registry
from memopt.core.registry import Axis
from memopt.masters.base import LOW_PRECISION, Master

MASTERS: Axis[Master] = registry.MASTERS


def master_of(name: str, dtype: str) -> Master:
    """The master ``name`` as a parameter of this dtype has it: none where it is wide enough itself."""
    return MASTERS[name if dtype in LOW_PRECISION else "none"]


__all__ = ["LOW_PRECISION", "MASTERS", "Master", "master_of"]
