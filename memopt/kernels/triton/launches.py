"""The launches of one step: tables on the device, and the kernels that go over tensors element by element, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.kernels.triton import scalars, tables
from memopt.kernels.triton.device import elementwise, row_means
from memopt.kernels.triton.device import fields as f
from memopt.kernels.triton.device.rules import STEPS, SUMS
from memopt.kernels.triton.tables import OPTIONS, SPAN
from memopt.kernels.triton.upload import Uploaded

if TYPE_CHECKING:
    from memopt.rules import Rule


class Launches:
    """Tables on the device, and the kernels that step these tensors in ``launches``: here of those without a factored
    moment; :mod:`memopt.kernels.triton.factored_launches` adds the others."""

    def __init__(
        self,
        rule: Rule,
        made: Sequence[tables.Tensors],
        device: torch.device,
        groups: int,  # how many param groups there are
    ) -> None:
        self.device = device
        self.name = rule.inner
        self.rule = scalars.NUMBER[self.name]
        self.step = {"RULE": STEPS[self.name], "LOOKAHEAD": rule.wrapper == "lookahead"}
        self.summed = dict(zip(("SUM", "M"), SUMS.get(self.name, ()), strict=False))
        self.launches: list[Callable[[Tensor], None]] = []
        self.workspace = 0  # fp32 numbers
        self.nbytes = 0  # on the device, about: of the tables
        self.buckets = [t.bucket for t in made]
        n = len(made)
        # Addresses and the steps' numbers are changed from the host; what the kernels say goes into the rest.
        self.gradients = Uploaded(torch.int64, n, device)
        self.inverse = self.name in ("adafactor", "came")
        self._steps: list[tuple[tables.Bucket, Tensor, int, Tensor, dict[str, Any]]] = []
        # Hyperparameters before steps: both begin at multiples of 16 bytes, which Triton looks at when it compiles.
        self.numbers = Uploaded(torch.float64, groups * f.HYPER.value + n, device)
        self.hyper, self.steps = self.numbers.tensor.split((groups * f.HYPER.value, n))
        self.scalars = torch.zeros(n * f.SCALARS.value, dtype=torch.float32, device=self.device)
        self.one = torch.ones(1, dtype=torch.float32, device=self.device)
        self.table = torch.empty(0, dtype=torch.int64)  # when all rows know where the sums of their programs are
        self._element_wise(made)
        self.launch_steps()

    def on_device(self, x: Tensor) -> Tensor:
        self.nbytes += x.nbytes
        return x.to(self.device)

    def by_bucket(self, made: Sequence[tables.Tensors], factored: bool) -> dict[tables.Bucket, list[int]]:
        """Those with a factored moment, or those without."""
        found: dict[tables.Bucket, list[int]] = {}
        for i, t in enumerate(made):
            if t.row[f.NUMEL.value] and (t.bucket.band > 0) == factored:
                found.setdefault(t.bucket, []).append(i)
        return found

    def _element_wise(self, made: Sequence[tables.Tensors]) -> None:
        buckets = self.by_bucket(made, False)
        for bucket, members in buckets.items():
            if bucket.means:
                self._row_means(made, bucket, members)
        self.over_elements(made, buckets, self.one, list(range(len(made))))

    def over_elements(
        self, made: Sequence[tables.Tensors], buckets: Mapping[tables.Bucket, list[int]], mean: Tensor, which: list[int]
    ) -> None:
        """Sums over tensors, where the rule takes some, and their step; ``mean`` are those of factored moments."""
        planned = []
        offset = 0
        for bucket, members in buckets.items():
            blocks = [made[i].blocks for i in members]
            run = tables.pieces_of_programs(sum(blocks), bucket.tile, bucket.width)
            programs = tables.programs(members, blocks, run * bucket.tile)
            constants = {**bucket.constants, "INVERSE": self.inverse, **OPTIONS}
            planned.append((bucket, self.on_device(programs), run, offset, constants))
            if self.name in SUMS:
                offset = self.place_sums(made, members, programs, offset)
        sums = torch.empty((offset, 2), dtype=torch.float64, device=self.device)
        if self.name in SUMS and planned:
            for _, map_, run, first, constants in planned:
                self.launch(
                    elementwise.sums_kernel, len(map_), map_, run, sums[first:], mean, **self.summed, **constants
                )
            self.launch_totals(sums, [i for i in which if made[i].row[f.SUMS.value]])
        for bucket, map_, run, _, constants in planned:
            self._steps.append((bucket, map_, run, mean, constants))

    def launch_steps(self) -> None:
        for bucket, map_, run, mean, constants in self._steps:
            v, m, x = bucket.slots
            self.launch(
                elementwise.step_kernel,
                len(map_),
                map_,
                run,
                mean,
                V=v,
                M=m,
                X=x or bucket.residual,
                X_SIGNED=bucket.x_signed,
                RESIDUAL=bucket.residual,
                **self.step,
                **constants,
            )
        self._steps.clear()

    def _row_means(self, made: Sequence[tables.Tensors], bucket: tables.Bucket, members: list[int]) -> None:
        rows = [-(-made[i].row[f.NUMEL.value] // made[i].row[f.ROW_SPAN.value]) for i in members]
        parts = [-(-count // made[i].row[f.ROW_GROUP.value]) for i, count in zip(members, rows, strict=True)]
        map_ = self.on_device(tables.programs(members, parts, 1))
        align = bucket.align if all(made[i].row[f.ROW_SPAN.value] % tables.VECTOR == 0 for i in members) else 1
        self.launch(
            row_means.row_means_kernel,
            len(map_),
            map_,
            ROWS=tables.WARPS,
            ALIGN=align,
            G_TYPE=tables.TYPES[bucket.g_type],
            num_warps=tables.WARPS,
            **OPTIONS,
        )

    @staticmethod
    def place_sums(made: Sequence[tables.Tensors], members: list[int], programs: Tensor, offset: int) -> int:
        """Tell each tensor where the sums of its programs are; returns where the next bucket's begin."""
        counts = torch.bincount(programs[:, 0].long(), minlength=len(made)).tolist()
        for i in members:
            made[i].row[f.SUMS_AT.value], made[i].row[f.SUMS.value] = offset, counts[i]
            offset += counts[i]
        return offset

    def launch(self, kernel: Any, count: int, *arguments: Any, **constants: Any) -> None:
        """A kernel that begins with table, gradients and scalars."""
        self.launches.append(
            lambda _: kernel[(count,)](self.table, self.gradients.tensor, self.scalars, *arguments, **constants)
        )

    def launch_totals(self, sums: Tensor, which: list[int]) -> None:
        chosen = self.on_device(torch.tensor(which, dtype=torch.int32))
        self.launches.append(
            lambda _: scalars.totals_kernel[(len(which),)](
                self.table, self.hyper, self.scalars, chosen, sums, RULE=self.rule, SPAN=SPAN, **OPTIONS
            )
        )
