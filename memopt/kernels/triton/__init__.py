"""Accelerated steps on CUDA, ROCm and XPU devices, in Triton: one template for every rule and format.

Importing this package imports neither torch nor triton. What is here executes the rules of :mod:`memopt.rules` on the
formats of :mod:`memopt.formats`; the plain torch path is the definition (``docs/kernels.md``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from memopt.engines.work import Work
    from memopt.kernels import StepContext
    from memopt.kernels.triton.plan import Plan
    from memopt.layout.param import ParamLayout

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


def serves(works: Sequence[Work]) -> bool:
    """Whether any of these parameters is on a device that the kernels are for."""
    return any(missing(work.p.device.type) is None for work in works)


def refuse(layout: ParamLayout, p: Tensor, world_size: int) -> str | None:
    """Why this parameter is stepped by the plain torch path, or None."""
    reason = missing(p.device.type)
    if reason:
        return reason
    from memopt.kernels.triton import tables

    return tables.refuse(layout, p, world_size)


def step(works: Sequence[Work], world_size: int, seed: int) -> list[Work]:
    """Step the parameters that the kernels can step; returns the others."""
    if not serves(works):
        return list(works)
    from memopt.kernels.triton import plan

    return plan.step(works, world_size, seed)


def make_plan(
    context: StepContext,
    works: Sequence[Work],
    originals: Mapping[int, Tensor],
    in_place: Callable[[str, torch.device], bool],
    before: object,
) -> Plan | None:
    """A prepared step for all of these parameters, or None."""
    if not serves(works):
        return None
    from memopt.kernels.triton import plan

    return plan.make(context, works, originals, in_place, before)


def capturing(device: torch.device) -> bool:
    """Whether what is launched now is recorded into a CUDA graph."""
    import torch

    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
