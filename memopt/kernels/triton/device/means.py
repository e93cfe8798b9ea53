"""Factored moments: passes over a matrix whose second moment is the means of its rows and columns.

A matrix is cut into bands (``bands.py``), one program each. A pass that renews a moment leaves, per band, the sums of
its rows and of its columns; ``gather_kernel`` adds them up in order, so the bits are the same in every run. The
reconstruction row * col / mean is never written.
"""

import triton
import triton.language as tl

from memopt.formats.factored import TINY
from memopt.kernels.triton.device import fields as f
from memopt.kernels.triton.device.bands import (
    HEIGHT,
    band,
    inverse_root,
    keep_columns,
    keep_rows,
    line_words,
    offsets,
    rows_of,
    vectors,
)
from memopt.kernels.triton.device.codes import load_anywhere, pointer
from memopt.kernels.triton.device.masters import SPLIT8, STOCHASTIC
from memopt.kernels.triton.device.rules import lerp, raw_update
from memopt.kernels.triton.device.tile import (
    find,
    gradient_of,
    load_gradient,
    load_parameter,
    load_scalars,
    look_ahead,
    parameter_of,
    store_parameter,
)

_TINY = tl.constexpr(TINY)


@triton.jit
def running_columns(row_of, c, ALIGN: tl.constexpr):
    """Columns of a matrix, none of one that does not step: it need not be there any more."""
    return tl.multiple_of(tl.where(c[f.RUN] != 0, tl.load(row_of + f.LINE), 0), ALIGN)


@triton.jit
def mean_kernel(table, scalars, means, map, SLOT: tl.constexpr, FLOOR: tl.constexpr, SPAN: tl.constexpr):
    """What a reconstruction divides by, one program per matrix: of a matrix the mean of its columns' means, of one of
    a stack that of its rows' means, as ``memopt/formats/factored.py`` has it; FLOOR bounds it as the rule says."""
    tensor, row_of, matrix = find(table, map)
    height = tl.load(row_of + f.HEIGHT)
    cols = tl.load(row_of + f.LINE)
    single = tl.load(row_of + f.STACKED) == 0
    column = tl.load(row_of + f.AUX0 + SLOT)
    row = tl.load(row_of + f.DATA0 + SLOT)
    running = tl.load(scalars + tensor * f.SCALARS + f.RUN) != 0
    count = tl.where(running, tl.where(single, cols, height), 0)
    at = tl.where(single, column, row).to(tl.pointer_type(tl.float32)) + tl.where(single, 0, matrix * height)
    total = tl.zeros((SPAN,), tl.float64)
    for start in range(0, count, SPAN):
        i = start + tl.arange(0, SPAN)
        total += tl.load(at + i, mask=i < count, other=0.0).to(tl.float64)
    mean = (tl.sum(total) / tl.maximum(count, 1).to(tl.float64)).to(tl.float32)
    floor = tl.load(scalars + tensor * f.SCALARS + f.MEAN_FLOOR) if FLOOR else _TINY
    tl.store(means + tl.load(row_of + f.MEANS_AT) + matrix * 2 + SLOT // 2, tl.where(mean < floor, floor, mean))


@triton.jit
def gather_kernel(table, scalars, partial, map, SLOT: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr):
    """Sums of bands to means of rows and columns: SPAN rows, or behind the last of them SPAN columns, per program."""
    tensor, row_of, number = find(table, map)
    height = tl.load(row_of + f.HEIGHT)
    cols = tl.load(row_of + f.LINE)
    numel = tl.load(row_of + f.NUMEL)
    rows = numel // cols
    row_programs = tl.cdiv(rows, SPAN).to(tl.int32)
    is_row = number < row_programs
    count = tl.where(is_row, rows, numel // height)
    bands = tl.where(is_row, tl.cdiv(cols, WIDTH), tl.cdiv(height, HEIGHT))
    length = tl.where(is_row, cols, height)
    source = partial + tl.where(is_row, tl.load(row_of + f.ROWS_AT), tl.load(row_of + f.COLS_AT))
    target = tl.where(is_row, tl.load(row_of + f.DATA0 + SLOT), tl.load(row_of + f.AUX0 + SLOT))
    i = tl.where(is_row, number, number - row_programs) * SPAN + tl.arange(0, SPAN)
    inside = i < tl.where(tl.load(scalars + tensor * f.SCALARS + f.RUN) != 0, count, 0)
    total = tl.zeros((SPAN,), tl.float64)
    for b in range(0, bands):
        total += tl.load(source + b * count + i, mask=inside, other=0.0).to(tl.float64)
    mean = (total / length.to(tl.float64)).to(tl.float32)
    tl.store(target.to(tl.pointer_type(tl.float32)) + i, mean, mask=inside)


@triton.jit
def renew_kernel(
    table,  # int64 [tensors, FIELDS]
    gradients,  # int64 [tensors]: addresses
    scalars,  # fp32 [tensors, SCALARS]
    means,  # fp32: two of every matrix
    partial,  # out: fp32, sums of bands
    sums,  # out: fp64 [programs, 2]: of p²
    map,  # int32 [programs, 2]: tensor, number of the band
    RENEW: tl.constexpr,
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    MASTER: tl.constexpr,
    K_TYPE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The second moment (place 0) decoded, renewed and summed."""
    tensor, row_of, tile = find(table, map)
    c = load_scalars(scalars + tensor * f.SCALARS)
    matrix, top, bottom, first, along, column, _inside = band(row_of, tile, WIDTH, ALIGN)
    inside = column < running_columns(row_of, c, ALIGN)
    rows, col, mean = vectors(row_of, means, matrix, column, inside, 0)
    p_at, stored_at = parameter_of(row_of, P_TYPE, K_TYPE, ALIGN)
    g_at = gradient_of(gradients, tensor, G_TYPE, ALIGN)
    columns = tl.zeros((TILE, WIDTH), tl.float32)
    squares = tl.zeros((TILE, WIDTH), tl.float32)
    bottom = tl.where(c[f.RUN] != 0, bottom, top)
    for start in range(top, bottom, TILE):
        r = start + tl.arange(0, TILE)
        live = r < bottom
        at, mask = offsets(row_of, matrix, r, live, column, inside, ALIGN)
        g = load_gradient(g_at, at, mask, c)
        p = load_parameter(p_at, stored_at, at, mask, MASTER, P_TYPE)
        v = tl.where(mask, RENEW(p, g, rows_of(rows, mean, r, live, False)[:, None] * col[None, :], c), 0.0)
        keep_rows(row_of, partial, matrix, along, r, live, tl.sum(v, 1))
        columns += v
        squares += p * p
    keep_columns(row_of, partial, matrix, first, column, inside, tl.sum(columns, 0))
    tl.store(sums + tl.program_id(0) * 2, tl.sum(tl.sum(squares, 1), 0).to(tl.float64))


@triton.jit
def updates_kernel(
    table,
    gradients,
    scalars,
    means,
    sums,
    map,
    SUM: tl.constexpr,
    M: tl.constexpr,
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    MASTER: tl.constexpr,
    K_TYPE: tl.constexpr,
    INVERSE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """What a rule needs to know of a tensor: the squares of SUM, summed: ``sums`` [programs, 1]. M: whether that takes
    the signed moment, and the parameter. INVERSE: SUM takes inverse roots."""
    tensor, row_of, tile = find(table, map)
    c = load_scalars(scalars + tensor * f.SCALARS)
    matrix, top, bottom, _first, _along, column, _inside = band(row_of, tile, WIDTH, ALIGN)
    inside = column < running_columns(row_of, c, ALIGN)
    rows, col, mean = vectors(row_of, means, matrix, column, inside, 0)
    if INVERSE:
        col = inverse_root(col)
    p_at, stored_at = parameter_of(row_of, P_TYPE, K_TYPE, ALIGN)
    g_at = gradient_of(gradients, tensor, G_TYPE, ALIGN)
    m_at = pointer(tl.load(row_of + f.DATA1), tl.float32, ALIGN)
    terms = tl.zeros((TILE, WIDTH), tl.float32)
    bottom = tl.where(c[f.RUN] != 0, bottom, top)
    for start in range(top, bottom, TILE):
        r = start + tl.arange(0, TILE)
        live = r < bottom
        at, mask = offsets(row_of, matrix, r, live, column, inside, ALIGN)
        g = load_gradient(g_at, at, mask, c)
        p = g
        m = g
        if M:
            p = load_parameter(p_at, stored_at, at, mask, MASTER, P_TYPE)
            m = tl.load(m_at + at, mask=mask, other=0.0)
        u = SUM(p, g, rows_of(rows, mean, r, live, INVERSE)[:, None] * col[None, :], m, c, True, True)
        terms += tl.where(mask, u * u, 0.0)
    tl.store(sums + tl.program_id(0) * 2 + 1, tl.sum(tl.sum(terms, 1), 0).to(tl.float64))


@triton.jit
def residual_kernel(
    table,
    gradients,
    scalars,
    means,
    partial,
    map,
    G_TYPE: tl.constexpr,
    M_KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """CAME's residual (place 2) decoded, renewed and summed."""
    tensor, row_of, tile = find(table, map)
    c = load_scalars(scalars + tensor * f.SCALARS)
    matrix, top, bottom, first, along, column, _inside = band(row_of, tile, WIDTH, ALIGN)
    inside = column < running_columns(row_of, c, ALIGN)
    rows, col, mean = vectors(row_of, means, matrix, column, inside, 0)
    x_rows, x_col, x_mean = vectors(row_of, means, matrix, column, inside, 2)
    col = inverse_root(col)
    g_at = gradient_of(gradients, tensor, G_TYPE, ALIGN)
    m_data = tl.load(row_of + f.DATA1)
    m_aux = tl.load(row_of + f.AUX1)
    cols = tl.load(row_of + f.COLS)
    columns = tl.zeros((TILE, WIDTH), tl.float32)
    bottom = tl.where(c[f.RUN] != 0, bottom, top)
    for start in range(top, bottom, TILE):
        r = start + tl.arange(0, TILE)
        live = r < bottom
        at, mask = offsets(row_of, matrix, r, live, column, inside, ALIGN)
        g = load_gradient(g_at, at, mask, c)
        m = load_anywhere(m_data, m_aux, at, mask, cols, M_KIND)
        v = rows_of(rows, mean, r, live, True)[:, None] * col[None, :]
        u, _same = raw_update(g, v, c, True, True)
        u = u * c[f.UPDATE_SCALE]
        m = lerp(m, u, c, f.FIRST)
        x = rows_of(x_rows, x_mean, r, live, False)[:, None] * x_col[None, :]
        x = lerp(x, (u - m) * (u - m) + c[f.EPS_RESIDUAL], c, f.THIRD)
        x = tl.where(mask, x, 0.0)
        keep_rows(row_of, partial, matrix, along, r, live, tl.sum(x, 1))
        columns += x
    keep_columns(row_of, partial, matrix, first, column, inside, tl.sum(columns, 0))


@triton.jit
def apply_kernel(
    table,
    gradients,
    scalars,
    means,
    map,
    RULE: tl.constexpr,
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    MASTER: tl.constexpr,
    K_TYPE: tl.constexpr,
    M: tl.constexpr,
    X: tl.constexpr,
    LOOKAHEAD: tl.constexpr,
    INVERSE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The parameter, and moments in fp32. INVERSE: the rule takes inverse roots. RESIDUAL: the third moment is CAME's,
    factored too, and the pass before has averaged it."""
    tensor, row_of, tile = find(table, map)
    c = load_scalars(scalars + tensor * f.SCALARS)
    matrix, top, bottom, _first, along, column, _inside = band(row_of, tile, WIDTH, ALIGN)
    inside = column < running_columns(row_of, c, ALIGN)
    rows, col, mean = vectors(row_of, means, matrix, column, inside, 0)
    x_rows, x_col, x_mean = rows, col, mean
    if RESIDUAL:
        x_rows, x_col, x_mean = vectors(row_of, means, matrix, column, inside, 2)
        x_col = inverse_root(x_col)
    if INVERSE:
        col = inverse_root(col)
    p_at, stored_at = parameter_of(row_of, P_TYPE, K_TYPE, ALIGN)
    g_at = gradient_of(gradients, tensor, G_TYPE, ALIGN)
    m_at = pointer(tl.load(row_of + f.DATA1), tl.float32, ALIGN)
    x_at = pointer(tl.load(row_of + f.DATA2), tl.float32, ALIGN)
    bottom = tl.where(c[f.RUN] != 0, bottom, top)
    for start in range(top, bottom, TILE):
        r = start + tl.arange(0, TILE)
        live = r < bottom
        at, mask = offsets(row_of, matrix, r, live, column, inside, ALIGN)
        g = load_gradient(g_at, at, mask, c)
        p = load_parameter(p_at, stored_at, at, mask, MASTER, P_TYPE)
        before = p
        m = g
        x = g
        if M:
            m = tl.load(m_at + at, mask=mask, other=0.0)
        if RESIDUAL:
            x = rows_of(x_rows, x_mean, r, live, True)[:, None] * x_col[None, :]
        elif X:
            x = tl.load(x_at + at, mask=mask, other=0.0)
        v = rows_of(rows, mean, r, live, INVERSE)[:, None] * col[None, :]
        p, _same, m, x = RULE(p, g, v, m, x, c, M, X, True, True)
        if LOOKAHEAD:
            p = look_ahead(row_of, at, mask, before, p, c, ALIGN)
        w = r
        if MASTER == STOCHASTIC or MASTER == SPLIT8:
            w = line_words(row_of, c, matrix, r, along * WIDTH, WIDTH)
        store_parameter(p_at, stored_at, at, mask, p, w, MASTER, P_TYPE)
        if M:
            tl.store(m_at + at, m, mask=mask)
        if X and not RESIDUAL:
            tl.store(x_at + at, x, mask=mask)
