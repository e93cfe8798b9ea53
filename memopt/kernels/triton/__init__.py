"""Accelerated steps on CUDA, ROCm and XPU devices, in Triton: one template for every rule and format.

Importing this package imports neither torch nor triton. What is here executes the rules of :mod:`memopt.rules` on the
formats of :mod:`memopt.formats`; the plain torch path is the definition (``docs/kernels.md``).
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib import util

#: Device types that Triton compiles for. Tests add "cpu", which its interpreter executes.
DEVICES = {"cuda", "xpu"}


def missing(device_type: str) -> str | None:
    """Why parameters on devices of this type are not stepped by Triton kernels, or None."""
    if device_type not in DEVICES:
        return f"there are no kernels for {device_type}"
    if os.environ.get("MEMOPT_KERNELS", "").lower() in ("off", "0", "no"):
        return "MEMOPT_KERNELS=off turned them off; unset it to use them"
    if not _installed():
        return "Triton is not installed: pip install triton"
    return None


@lru_cache
def _installed() -> bool:
    return util.find_spec("triton") is not None


@lru_cache
def version() -> str:
    from importlib import metadata

    return metadata.version("triton")


def status(device_type: str) -> str:
    """One sentence: which code steps parameters on a device of this type."""
    reason = missing(device_type)
    return f"the plain torch path: {reason}" if reason else f"fused Triton {version()} kernels, many tensors per launch"
