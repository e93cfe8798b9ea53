"""Whether Triton's kernels can be used here, and for which devices. Imports neither torch nor triton."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from importlib import util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: Device types that Triton compiles for. Tests add "cpu", which its interpreter executes.
DEVICES = {"cuda", "xpu"}
#: Before it a kernel could not be given a function to compile in.
OLDEST = (3, 3)


def missing(device_type: str) -> str | None:
    """Why parameters on devices of this type are not stepped by Triton kernels, or None."""
    if device_type not in DEVICES:
        return f"there are no kernels for {device_type}"
    if os.environ.get("MEMOPT_KERNELS", "").lower() in ("off", "0", "no"):
        return "MEMOPT_KERNELS=off turned them off; unset it to use them"
    if not _installed():
        return "Triton is not installed: pip install triton"
    if tuple(int(n) for n in re.findall(r"\d+", version())[:2]) < OLDEST:
        return f"the kernels need Triton {'.'.join(map(str, OLDEST))} (that of torch 2.7), and {version()} is installed"
    return None if device_type == "cpu" else _not_starting()


@lru_cache
def _installed() -> bool:
    return util.find_spec("triton") is not None


@lru_cache
def _not_starting() -> str | None:
    """Triton builds a small module in C before its first launch, and many an image has no compiler: better to know
    before a step has begun."""
    import torch

    if not torch.accelerator.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        return f"Triton does not start here: {first} (it needs a C compiler and Python's header files)"
    return None


@lru_cache
def version() -> str:
    """As the module says: the package has another name on ROCm and XPU."""
    from importlib import import_module

    return str(import_module("triton").__version__)


def status(device_type: str) -> str:
    """One sentence: which code steps parameters on a device of this type."""
    reason = missing(device_type)
    return f"the plain torch path: {reason}" if reason else f"fused Triton {version()} kernels, many tensors per launch"


def capturing(device: torch.device) -> bool:
    """Whether what is launched now is recorded into a CUDA graph."""
    import torch

    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
