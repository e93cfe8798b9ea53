"""Whether a step happens, and what its gradients are multiplied by: NaN and Inf, a scaler's scale, clipping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf, isfinite, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple, final

from torch import Tensor

from memopt.core.user_warning import warn
from memopt.placements.gradients.checks import clip_factor, rounded, seen_finite

if TYPE_CHECKING:
    from memopt.optim.params import Params


class Scaler(NamedTuple):
    """What torch.amp.GradScaler has put on the optimizer for this step."""

    found_inf: Tensor | None
    grad_scale: Tensor | None


def bounds_of(groups: Sequence[Mapping[str, Any]]) -> list[float | None] | None:
    """The ``max_grad_norm`` of each group; None where none has one."""
    bounds = [group.get("max_grad_norm") for group in groups]
    if all(bound is None for bound in bounds):
        return None
    return [None if bound is None else float(bound) for bound in bounds]


@final
class GradientPolicy:
    """What ``nonfinite``, torch.amp.GradScaler and ``max_grad_norm`` make of the gradients of a step."""

    def __init__(self, params: Params) -> None:
        self._params, self._setup = params, params.setup
        #: Steps that did not happen, as far as the host has counted them.
        self.skipped = 0
        #: The norm of all gradients of the last step, fp32; None where nobody asked for it.
        self.norm: float | Tensor | None = None

    def scales(
        self,
        scaler: Scaler,
        bounds: Sequence[float | None] | None,
        parameters: Sequence[Tensor],
        look: Callable[[bool], tuple[list[str], list[float]]],
    ) -> list[float] | None:
        """For each group the number that its gradients are multiplied by: what undoes a scaler's scale, and what clips
        them. None where this step does not happen; it is counted then. One ``look(summed)`` at the gradients of
        ``parameters`` gives the names of those with NaN or Inf and, if summed, the sums of their squares."""
        partition, groups = self._setup.partition, self._params.owner.param_groups
        inverse = 1.0
        if scaler.found_inf is not None and bool(scaler.found_inf):
            self.skipped += 1
            return None
        if scaler.grad_scale is not None:
            inverse = rounded(1.0 / float(scaler.grad_scale))
        if bounds is None:
            self.norm = None
            if self._setup.nonfinite != "propagate":
                # Clipping has just read them; what other ranks have is asked in any case.
                finite = seen_finite(None if p.grad is None else partition.memory_of(p, p.grad) for p in parameters)
                if self.stopped_by(partition.any_rank([] if finite else look(False)[0], parameters)):
                    return None
            return [inverse] * len(groups)
        bad, squares = look(True)
        total = partition.total_squares(parameters, squares)
        self.norm = norm = rounded(sqrt(total) * inverse) if parameters else 0.0
        if not isfinite(total) and self._setup.nonfinite != "propagate":
            self.stopped_by(bad or ["a parameter on another rank"])
            return None
        return [rounded(inverse * clip_factor(norm, inf if bound is None else bound)) for bound in bounds]

    def stopped_by(self, bad: Sequence[str]) -> bool:
        """Whether a step does not happen because these gradients have NaN or Inf; it is counted, and said once."""
        if not bad:
            return False
        shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        if self._setup.nonfinite == "raise":
            raise FloatingPointError(f"NaN or Inf in the gradient of {shown}; nothing was changed")
        if not self.skipped:
            warn(
                f"NaN or Inf in the gradient of {shown}: this step was skipped, parameters and state are as they "
                "were. Later skips are only counted, in optimizer.skipped_steps."
            )
        self.skipped += 1
        return True
