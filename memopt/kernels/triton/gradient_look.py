"""The look at all gradients before a step: which are not finite, and the norm of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memopt.kernels.triton import tables
from memopt.kernels.triton.device import fields as f
from memopt.kernels.triton.device.finite import finite_kernel, norm_kernel
from memopt.kernels.triton.tables import OPTIONS, SPAN

#: Elements of a tile.
TILE = 2048


class GradientLook:
    """``flags``: one for each tensor whose gradient is not finite, then one for any; ``norm`` is fp32 [1]. The
    addresses of the gradients are in ``gradients``, int64 on the device."""

    def __init__(self, made: Sequence[tables.Tensors], gradients: Tensor, device: torch.device) -> None:
        self._gradients, self._device, self._count = gradients, device, len(made)
        self.flags = torch.zeros(len(made) + 2, dtype=torch.int32, device=device)
        self.norm = torch.zeros(1, dtype=torch.float32, device=device)
        self.nbytes = 0  # on the device, of the tables
        self._launches: list[Callable[[bool], None]] = []
        self._sums = torch.zeros(self._prepare(made), dtype=torch.float64, device=device)

    def _on_device(self, x: Tensor) -> Tensor:
        self.nbytes += x.nbytes
        return x.to(self._device)

    def _prepare(self, made: Sequence[tables.Tensors]) -> int:
        """One launch for each dtype and alignment of gradients; returns how many sums they leave."""
        numels = self._on_device(torch.tensor([t.row[f.NUMEL.value] for t in made], dtype=torch.int64))
        kinds: dict[tuple[torch.dtype, int], list[int]] = {}
        for i, t in enumerate(made):
            aligned = t.bucket.align > 1 and t.row[f.NUMEL.value] % tables.VECTOR == 0
            kinds.setdefault((t.bucket.g_type, tables.VECTOR if aligned else 1), []).append(i)
        before = 0
        for (dtype, align), members in kinds.items():
            pieces = [-(-made[i].row[f.NUMEL.value] // TILE) for i in members]
            run = tables.pieces_of_programs(sum(pieces), 1, TILE)
            map_ = self._on_device(tables.programs(members, pieces, run))
            if len(map_):
                self._launches.append(self._launch(numels, map_, run, before, dtype, align))
                before += len(map_)
        return before

    def _launch(
        self, numels: Tensor, map_: Tensor, run: int, before: int, dtype: torch.dtype, align: int
    ) -> Callable[[bool], None]:
        return lambda summed: finite_kernel[(len(map_),)](
            self._gradients,
            numels,
            map_,
            run,
            self.flags,
            self._count,
            self._sums[before:],
            SUMMED=summed,
            G_TYPE=tables.TYPES[dtype],
            TILE=TILE,
            ALIGN=align,
            num_warps=4,
            **OPTIONS,
        )

    def launch(self, summed: bool, grad_scale: Tensor) -> None:
        """Set the flags and, with ``summed``, the norm of all gradients, divided by ``grad_scale``."""
        for launch in self._launches:
            launch(summed)
        if summed:
            norm_kernel[(1,)](self._sums, len(self._sums), grad_scale, self.norm, SPAN=SPAN, **OPTIONS)
