"""The launches of one step: some parameters of one device, their tables, and the kernels in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.kernels.triton import scalars, tables
from memopt.kernels.triton.device import elementwise, means, row_means
from memopt.kernels.triton.device import fields as f
from memopt.kernels.triton.device.finite import finite_kernel, norm_kernel
from memopt.kernels.triton.device.rules import RENEWALS, STEPS, SUMS
from memopt.kernels.triton.upload import Uploaded

if TYPE_CHECKING:
    from memopt.rules import Rule

#: Additions and multiplications are fused where the source says so, as in the C++ kernels.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}
#: Entries that a program of the small kernels takes at a time, and elements of a tile of the look at the gradients.
SPAN, FINITE_TILE = 256, 2048


class Launcher:
    """Tables on the device and launches for these tensors; ``run`` launches, and waits for nothing."""

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
        self.flags = torch.zeros(n + 2, dtype=torch.int32, device=self.device)
        self.skipped = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.zero = torch.zeros(1, dtype=torch.float32, device=self.device)
        self.one = torch.ones(1, dtype=torch.float32, device=self.device)
        self._element_wise(made)
        self._launch_steps()
        self._factored(made)
        self.table = self._on_device(torch.tensor([t.row for t in made], dtype=torch.int64))
        self._looks: list[Callable[[bool], None]] = []
        self.sums = torch.zeros(self._make_looks(made), dtype=torch.float64, device=self.device)
        self.norm = torch.zeros(1, dtype=torch.float32, device=self.device)
        # Of tables that need a few bytes each the allocator takes 512 of.
        self.nbytes += 8 * 512 + sum(x.nbytes for x in (self.gradients.tensor, self.numbers.tensor, self.scalars))

    def _on_device(self, x: Tensor) -> Tensor:
        self.nbytes += x.nbytes
        return x.to(self.device)

    def guard(self) -> AbstractContextManager[Any]:
        """Triton launches on the current device, which need not be that of the parameters."""
        if self.device.type == "cpu":
            return nullcontext()
        guard: AbstractContextManager[Any] = torch.get_device_module(self.device).device(self.device)
        return guard

    # Making launches -------------------------------------------------------------------------------------------

    def _by_bucket(self, made: Sequence[tables.Tensors], factored: bool) -> dict[tables.Bucket, list[int]]:
        """Those with a factored moment, or those without."""
        found: dict[tables.Bucket, list[int]] = {}
        for i, t in enumerate(made):
            if t.row[f.NUMEL.value] and (t.bucket.band > 0) == factored:
                found.setdefault(t.bucket, []).append(i)
        return found

    def _element_wise(self, made: Sequence[tables.Tensors]) -> None:
        buckets = self._by_bucket(made, False)
        for bucket, members in buckets.items():
            if bucket.means:
                self._row_means(made, bucket, members)
        self._over_elements(made, buckets, self.one, list(range(len(made))))

    def _over_elements(
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
            planned.append((bucket, self._on_device(programs), run, offset, constants))
            if self.name in SUMS:
                offset = self._place_sums(made, members, programs, offset)
        sums = torch.empty((offset, 2), dtype=torch.float64, device=self.device)
        if self.name in SUMS and planned:
            for _, map_, run, first, constants in planned:
                self._launch(
                    elementwise.sums_kernel, len(map_), map_, run, sums[first:], mean, **self.summed, **constants
                )
            self._launch_totals(sums, [i for i in which if made[i].row[f.SUMS.value]])
        for bucket, map_, run, _, constants in planned:
            self._steps.append((bucket, map_, run, mean, constants))

    def _launch_steps(self) -> None:
        for bucket, map_, run, mean, constants in self._steps:
            v, m, x = bucket.slots
            self._launch(
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
        map_ = self._on_device(tables.programs(members, parts, 1))
        align = bucket.align if all(made[i].row[f.ROW_SPAN.value] % tables.VECTOR == 0 for i in members) else 1
        self._launch(
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
    def _place_sums(made: Sequence[tables.Tensors], members: list[int], programs: Tensor, offset: int) -> int:
        """Tell each tensor where the sums of its programs are; returns where the next bucket's begin."""
        counts = torch.bincount(programs[:, 0].long(), minlength=len(made)).tolist()
        for i in members:
            made[i].row[f.SUMS_AT.value], made[i].row[f.SUMS.value] = offset, counts[i]
            offset += counts[i]
        return offset

    def _launch(self, kernel: Any, count: int, *arguments: Any, **constants: Any) -> None:
        """A kernel that begins with table, gradients and scalars."""
        self.launches.append(
            lambda _: kernel[(count,)](self.table, self.gradients.tensor, self.scalars, *arguments, **constants)
        )

    def _launch_totals(self, sums: Tensor, which: list[int]) -> None:
        chosen = self._on_device(torch.tensor(which, dtype=torch.int32))
        self.launches.append(
            lambda _: scalars.totals_kernel[(len(which),)](
                self.table, self.hyper, self.scalars, chosen, sums, RULE=self.rule, SPAN=SPAN, **OPTIONS
            )
        )

    def _factored(self, made: Sequence[tables.Tensors]) -> None:
        """Batches of tensors whose sums of bands fit into the workspace, one after the other."""
        for bucket, members in self._by_bucket(made, True).items():
            batch: list[int] = []
            used = matrices = 0
            for i in members:
                row = made[i].row
                count, down, across = tables.bands(row, bucket.band)
                need = count * (across * row[f.HEIGHT.value] + down * row[f.LINE.value])
                if batch and (used + need) * 4 > tables.WORKSPACE:
                    self._batch(made, bucket, batch, matrices)
                    batch, used, matrices = [], 0, 0
                row[f.ROWS_AT.value] = used
                row[f.COLS_AT.value] = used + count * across * row[f.HEIGHT.value]
                row[f.MEANS_AT.value] = matrices * 2
                batch.append(i)
                used, matrices = used + need, matrices + count
                self.workspace = max(self.workspace, used)
            self._batch(made, bucket, batch, matrices)

    def _batch(self, made: Sequence[tables.Tensors], bucket: tables.Bucket, batch: list[int], matrices: int) -> None:
        cut = [tables.bands(made[i].row, bucket.band) for i in batch]
        bands = tables.programs(batch, [count * down * across for count, down, across in cut], 1)
        rows = [count * made[i].row[f.HEIGHT.value] for i, (count, _, _) in zip(batch, cut, strict=True)]
        cols = [count * made[i].row[f.LINE.value] for i, (count, _, _) in zip(batch, cut, strict=True)]
        vectors = [-(-r // SPAN) - (-c // SPAN) for r, c in zip(rows, cols, strict=True)]
        if bucket.factored:
            self._place_sums(made, batch, bands, 0)
        map_, gather = self._on_device(bands), self._on_device(tables.programs(batch, vectors, 1))
        each = self._on_device(tables.programs(batch, [count for count, _, _ in cut], 1))
        sums = torch.zeros((len(map_), 2), dtype=torch.float64, device=self.device)
        mean = torch.ones(matrices * 2, dtype=torch.float32, device=self.device)
        p_type, g_type = tables.TYPES[bucket.p_type], tables.TYPES[bucket.g_type]
        tile = (tables.WIDE if bucket.band == tables.WIDE[0] else tables.NARROW)[1]
        size = {"WIDTH": bucket.band, "TILE": tile, "ALIGN": bucket.align, "num_warps": 8, **OPTIONS}
        dtypes = {"P_TYPE": p_type, "G_TYPE": g_type, **bucket.master_constants}
        m, x = bucket.slots[1:]

        def find_mean(slot: int, floor: bool) -> None:
            self.launches.append(
                lambda _: means.mean_kernel[(len(each),)](
                    self.table, self.scalars, mean, each, SLOT=slot, FLOOR=floor, SPAN=SPAN, **OPTIONS
                )
            )

        def gather_means(slot: int) -> None:
            self.launches.append(
                lambda workspace: means.gather_kernel[(len(gather),)](
                    self.table, self.scalars, workspace, gather, SLOT=slot, WIDTH=bucket.band, SPAN=SPAN, **OPTIONS
                )
            )
            find_mean(slot, True)

        find_mean(0, False)
        self.launches.append(
            lambda workspace: means.renew_kernel[(len(map_),)](
                self.table,
                self.gradients.tensor,
                self.scalars,
                mean,
                workspace,
                sums,
                map_,
                RENEW=RENEWALS[self.name],
                **dtypes,
                **size,
            )
        )
        gather_means(0)
        if not bucket.factored:
            self._over_elements(made, {bucket: batch}, mean, batch)
        elif self.name in SUMS:
            self._launch(
                means.updates_kernel, len(map_), mean, sums, map_, INVERSE=self.inverse, **self.summed, **dtypes, **size
            )
            self._launch_totals(sums, batch)
        if bucket.residual:
            find_mean(2, False)
            m_kind = bucket.constants["M_KIND"]
            self.launches.append(
                lambda workspace: means.residual_kernel[(len(map_),)](
                    self.table,
                    self.gradients.tensor,
                    self.scalars,
                    mean,
                    workspace,
                    map_,
                    G_TYPE=g_type,
                    M_KIND=m_kind,
                    **size,
                )
            )
            gather_means(2)
        if not bucket.factored:
            self._launch_steps()
            return
        self._launch(
            means.apply_kernel,
            len(map_),
            mean,
            map_,
            M=m,
            X=x,
            INVERSE=self.inverse,
            RESIDUAL=bucket.residual,
            **self.step,
            **dtypes,
            **size,
        )

    def _make_looks(self, made: Sequence[tables.Tensors]) -> int:
        """One launch for each dtype and alignment of gradients; returns how many sums they leave."""
        numels = self._on_device(torch.tensor([t.row[f.NUMEL.value] for t in made], dtype=torch.int64))
        kinds: dict[tuple[torch.dtype, int], list[int]] = {}
        for i, t in enumerate(made):
            aligned = t.bucket.align > 1 and t.row[f.NUMEL.value] % tables.VECTOR == 0
            kinds.setdefault((t.bucket.g_type, tables.VECTOR if aligned else 1), []).append(i)
        before = 0
        for (dtype, align), members in kinds.items():
            pieces = [-(-made[i].row[f.NUMEL.value] // FINITE_TILE) for i in members]
            run = tables.pieces_of_programs(sum(pieces), 1, FINITE_TILE)
            map_ = self._on_device(tables.programs(members, pieces, run))
            if len(map_):
                self._looks.append(self._make_look(numels, map_, run, before, dtype, align))
                before += len(map_)
        return before

    def _make_look(
        self, numels: Tensor, map_: Tensor, run: int, before: int, dtype: torch.dtype, align: int
    ) -> Callable[[bool], None]:
        return lambda summed: finite_kernel[(len(map_),)](
            self.gradients.tensor,
            numels,
            map_,
            run,
            self.flags,
            len(self.buckets),
            self.sums[before:],
            SUMMED=summed,
            G_TYPE=tables.TYPES[dtype],
            TILE=FINITE_TILE,
            ALIGN=align,
            num_warps=4,
            **OPTIONS,
        )

    # Running ---------------------------------------------------------------------------------------------------

    def look(self, summed: bool = False, grad_scale: Tensor | None = None) -> None:
        """Set the flags of gradients that are not finite, and with ``summed`` the norm of all."""
        with self.guard():
            for launch in self._looks:
                launch(summed)
            if summed:
                scale = self.one if grad_scale is None else grad_scale
                norm_kernel[(1,)](self.sums, len(self.sums), scale, self.norm, SPAN=SPAN, **OPTIONS)

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
