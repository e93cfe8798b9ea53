"""State that somebody else put into the optimizer: what can be taken over is brought into the parameter's layout.

A state meets this file where it was found not to be of its layout (:meth:`memopt.layout.param.ParamLayout.misfit`),
before anything is stepped or counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from memopt.layout.param import ParamLayout


def take_over(layout: ParamLayout, p: Tensor, state: Mapping[str, Any], device: torch.device) -> dict[str, Any] | None:
    """A state of this layout with the values of ``state``, or None where they mean nothing in it. ``p`` are the rows of
    the parameter, ``device`` is where the number of steps is counted."""
    counter = state.get("step", 0.0)
    if isinstance(counter, bool) or not isinstance(counter, (int, float, Tensor)):
        return None
    if isinstance(counter, Tensor):
        if counter.numel() != 1 or counter.is_complex():
            return None
        counter = float(counter)
    fits = {key: x.contiguous() if key in layout.tensors and isinstance(x, Tensor) else x for key, x in state.items()}
    fits["step"] = torch.full((), counter, dtype=torch.float32, device=device)
    return fits if layout.misfit(p, fits) is None else None
