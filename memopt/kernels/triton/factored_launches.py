"""The launches of tensors with a factored moment: sums of bands into a workspace, means, then the step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memopt.kernels.triton import tables
from memopt.kernels.triton.device import fields as f
from memopt.kernels.triton.device import means
from memopt.kernels.triton.device.rules import RENEWALS, SUMS
from memopt.kernels.triton.launches import Launches
from memopt.kernels.triton.tables import OPTIONS, SPAN


def add_factored(launches: Launches, made: Sequence[tables.Tensors]) -> None:
    """Batches of tensors whose sums of bands fit into the workspace, one after the other."""
    for bucket, members in launches.by_bucket(made, True).items():
        batch: list[int] = []
        used = matrices = 0
        for i in members:
            row = made[i].row
            count, down, across = tables.bands(row, bucket.band)
            need = count * (across * row[f.HEIGHT.value] + down * row[f.LINE.value])
            if batch and (used + need) * 4 > tables.WORKSPACE:
                _batch(launches, made, bucket, batch, matrices)
                batch, used, matrices = [], 0, 0
            row[f.ROWS_AT.value] = used
            row[f.COLS_AT.value] = used + count * across * row[f.HEIGHT.value]
            row[f.MEANS_AT.value] = matrices * 2
            batch.append(i)
            used, matrices = used + need, matrices + count
            launches.workspace = max(launches.workspace, used)
        _batch(launches, made, bucket, batch, matrices)


def _batch(
    launches: Launches, made: Sequence[tables.Tensors], bucket: tables.Bucket, batch: list[int], matrices: int
) -> None:
    cut = [tables.bands(made[i].row, bucket.band) for i in batch]
    bands = tables.programs(batch, [count * down * across for count, down, across in cut], 1)
    rows = [count * made[i].row[f.HEIGHT.value] for i, (count, _, _) in zip(batch, cut, strict=True)]
    cols = [count * made[i].row[f.LINE.value] for i, (count, _, _) in zip(batch, cut, strict=True)]
    vectors = [-(-r // SPAN) - (-c // SPAN) for r, c in zip(rows, cols, strict=True)]
    if bucket.factored:
        launches.place_sums(made, batch, bands, 0)
    map_, gather = launches.on_device(bands), launches.on_device(tables.programs(batch, vectors, 1))
    each = launches.on_device(tables.programs(batch, [count for count, _, _ in cut], 1))
    sums = torch.zeros((len(map_), 2), dtype=torch.float64, device=launches.device)
    mean = torch.ones(matrices * 2, dtype=torch.float32, device=launches.device)
    p_type, g_type = tables.TYPES[bucket.p_type], tables.TYPES[bucket.g_type]
    tile = (tables.WIDE if bucket.band == tables.WIDE[0] else tables.NARROW)[1]
    size = {"WIDTH": bucket.band, "TILE": tile, "ALIGN": bucket.align, "num_warps": 8, **OPTIONS}
    dtypes = {"P_TYPE": p_type, "G_TYPE": g_type, **bucket.master_constants}
    m, x = bucket.slots[1:]

    def find_mean(slot: int, floor: bool) -> None:
        launches.launches.append(
            lambda _: means.mean_kernel[(len(each),)](
                launches.table, launches.scalars, mean, each, SLOT=slot, FLOOR=floor, SPAN=SPAN, **OPTIONS
            )
        )

    def gather_means(slot: int) -> None:
        launches.launches.append(
            lambda workspace: means.gather_kernel[(len(gather),)](
                launches.table, launches.scalars, workspace, gather, SLOT=slot, WIDTH=bucket.band, SPAN=SPAN, **OPTIONS
            )
        )
        find_mean(slot, True)

    find_mean(0, False)
    launches.launches.append(
        lambda workspace: means.renew_kernel[(len(map_),)](
            launches.table,
            launches.gradients.tensor,
            launches.scalars,
            mean,
            workspace,
            sums,
            map_,
            RENEW=RENEWALS[launches.name],
            **dtypes,
            **size,
        )
    )
    gather_means(0)
    if not bucket.factored:
        launches.over_elements(made, {bucket: batch}, mean, batch)
    elif launches.name in SUMS:
        launches.launch(
            means.updates_kernel,
            len(map_),
            mean,
            sums,
            map_,
            INVERSE=launches.inverse,
            **launches.summed,
            **dtypes,
            **size,
        )
        launches.launch_totals(sums, batch)
    if bucket.residual:
        find_mean(2, False)
        m_kind = bucket.constants["M_KIND"]
        launches.launches.append(
            lambda workspace: means.residual_kernel[(len(map_),)](
                launches.table,
                launches.gradients.tensor,
                launches.scalars,
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
        launches.launch_steps()
        return
    launches.launch(
        means.apply_kernel,
        len(map_),
        mean,
        map_,
        M=m,
        X=x,
        INVERSE=launches.inverse,
        RESIDUAL=bucket.residual,
        **launches.step,
        **dtypes,
        **size,
    )
