"""A launcher: some parameters of one device, their tables, and what a step launches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.kernels.triton import scalars, tables
from memopt.kernels.triton.factored_launches import add_factored
from memopt.kernels.triton.gradient_look import GradientLook
from memopt.kernels.triton.launches import Launches
from memopt.kernels.triton.tables import OPTIONS

if TYPE_CHECKING:
    from memopt.rules import Rule


class Launcher(Launches):
    """Tables on the device and launches for these tensors; ``run`` launches, and waits for nothing."""

    def __init__(
        self,
        rule: Rule,
        made: Sequence[tables.Tensors],
        device: torch.device,
        groups: int,  # how many param groups there are
    ) -> None:
        super().__init__(rule, made, device, groups)
        add_factored(self, made)
        self.table = self.on_device(torch.tensor([t.row for t in made], dtype=torch.int64))
        self._look = GradientLook(made, self.gradients.tensor, device)
        self.flags, self.norm = self._look.flags, self._look.norm
        self.skipped = torch.zeros(1, dtype=torch.int64, device=device)
        self.zero = torch.zeros(1, dtype=torch.float32, device=device)
        # Of tables that need a few bytes each the allocator takes 512 of.
        tables_ = self.gradients.tensor, self.numbers.tensor, self.scalars
        self.nbytes += self._look.nbytes + 8 * 512 + sum(x.nbytes for x in tables_)

    def guard(self) -> AbstractContextManager[Any]:
        """Triton launches on the current device, which need not be that of the parameters."""
        if self.device.type == "cpu":
            return nullcontext()
        guard: AbstractContextManager[Any] = torch.get_device_module(self.device).device(self.device)
        return guard

    def look(self, summed: bool = False, grad_scale: Tensor | None = None) -> None:
        """Set the flags of gradients that are not finite, and with ``summed`` the norm of all."""
        with self.guard():
            self._look.launch(summed, self.one if grad_scale is None else grad_scale)

    def run(self, found_inf: Tensor | None = None, grad_scale: Tensor | None = None) -> None:
        """Step every tensor, unless a flag or ``found_inf`` says that this step does not happen."""
        n = len(self.buckets)
        with self.guard():
            scalars.prepare_kernel[(n,)](
                self.table,
                self.gradients.tensor,
                self.hyper,
                self.steps,
                self.scalars,
                self.flags,
                self.skipped,
                self.zero if found_inf is None else found_inf,
                self.one if grad_scale is None else grad_scale,
                self.norm,
                n,
                RULE=self.rule,
                num_warps=1,
                **OPTIONS,
            )
            workspace = torch.empty(self.workspace, dtype=torch.float32, device=self.device)
            for launch in self.launches:
                launch(workspace)
