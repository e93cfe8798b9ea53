"""The element-wise step, one template for every rule and format: decode -> rule -> encode, over many tensors.

A tensor is cut into blocks: WIDTH columns of one row, which is a block of the format where that has blocks. A program
takes ``run`` tiles of TILE blocks each of one tensor, and finds in ``map`` which. Everything that differs from step to
step is read from device memory, so nothing is compiled again and nothing is asked of the host.
"""

import triton
import triton.language as tl

from memopt.kernels.triton.device import fields as f
from memopt.kernels.triton.device import row_means
from memopt.kernels.triton.device.codes import FULL, NARROW, load_moment, store_moment
from memopt.kernels.triton.device.dither import MASTER_TURNS, MOMENT_TURNS, shuffled, words
from memopt.kernels.triton.device.masters import SPLIT8, STOCHASTIC
from memopt.kernels.triton.device.row_means import load_factors, load_row_means
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

_NO_MEANS, _FACTORS = row_means.NONE, row_means.FACTORS


@triton.jit
def load_geometry(table_row):
    """Columns, blocks of a row, the division by them, elements, and blocks. As all of the table before the loop: in it
    a load would wait for the stores, which might have changed what is read."""
    return (
        tl.load(table_row + f.COLS),
        tl.load(table_row + f.PER_ROW).to(tl.int32),
        tl.load(table_row + f.MAGIC).to(tl.uint32),
        tl.load(table_row + f.SHIFT).to(tl.uint32),
        tl.load(table_row + f.NUMEL),
        tl.load(table_row + f.BLOCKS).to(tl.int32),
    )


@triton.jit
def place(geometry, block, WIDTH: tl.constexpr, HALVES: tl.constexpr, ALIGN: tl.constexpr, WHOLE: tl.constexpr):
    """Where blocks are: row and first column [blocks], the mask [blocks, WIDTH], and what :func:`load_moment` takes:
    offsets [blocks, WIDTH], those of packed bytes and their mask if there are HALVES, the place of each block and that
    of the first of its narrow ones among those of its format, and which blocks there are.

    ALIGN: of the beginning of a row, in elements; WHOLE: a row is a whole number of blocks.
    """
    cols, per_row, magic, shift, numel, blocks = geometry
    row = (tl.umulhi((block * 2).to(tl.uint32), magic) >> shift).to(tl.int32)
    column = (block - row * per_row) * WIDTH
    start = tl.multiple_of(row.to(tl.int64) * cols + column, ALIGN)
    lane = tl.arange(0, WIDTH)[None, :]
    at = start[:, None] + lane
    live = block < blocks
    mask = live[:, None]
    if not WHOLE:
        left = tl.minimum(numel - start, cols - column)  # elements from here to the row's end
        left = tl.multiple_of(tl.minimum(left, WIDTH).to(tl.int32), ALIGN)
        mask = mask & (lane < left[:, None])
    half_at = at
    half_live = mask
    narrow = block
    if HALVES:
        if WIDTH > NARROW:
            narrow = row * ((cols + NARROW - 1) // NARROW).to(tl.int32) + column // NARROW
        half = tl.arange(0, WIDTH // 2)[None, :]
        line = row.to(tl.int64) * ((cols + 1) // 2) + column // 2
        half_at = tl.multiple_of(line, ALIGN // 2 if ALIGN > 1 else 1)[:, None] + half
        half_live = live[:, None]
        if not WHOLE:
            half_live = half_live & (half * 2 < left[:, None])
    return row, column, mask, (at, half_at, half_live, block, narrow, live)


@triton.jit
def keep_moment(
    data,
    aux,
    key,
    step,
    row,
    column,
    where,
    mask,
    x,
    KIND: tl.constexpr,
    SIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A moment's tile, rounded with the dither of its key where its format rounds."""
    w = row
    if KIND != FULL:
        w = words(key, step, row, column, WIDTH)
    if not WHOLE:
        x = tl.where(mask, x, 0.0)
    store_moment(data, aux, where, mask, x, w, KIND, SIGNED, WIDTH, ALIGN)


@triton.jit(do_not_specialize=["run"])
def step_kernel(
    table,  # int64 [tensors, FIELDS]
    gradients,  # int64 [tensors]: addresses
    scalars,  # fp32 [tensors, SCALARS]
    map,  # int32 [programs, 2]: tensor, first block
    run,  # tiles of one program
    means,  # fp32: two of every matrix with a factored moment
    RULE: tl.constexpr,
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    V_KIND: tl.constexpr,
    M_KIND: tl.constexpr,
    X_KIND: tl.constexpr,
    HALVES: tl.constexpr,  # whether one of them is packed
    V: tl.constexpr,  # which moments there are
    M: tl.constexpr,
    X: tl.constexpr,
    X_SIGNED: tl.constexpr,
    MEANS: tl.constexpr,  # whether the second moment is means, and already that of this step
    INVERSE: tl.constexpr,  # whether RULE takes the inverse roots of means
    RESIDUAL: tl.constexpr,  # whether the third moment is CAME's, factored too
    LOOKAHEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISE: tl.constexpr,
    MASTER: tl.constexpr,
    K_TYPE: tl.constexpr,
):
    tensor, row_of, first = find(table, map)
    c = load_scalars(scalars + tensor * f.SCALARS)
    geometry = load_geometry(row_of)
    last = tl.where(c[f.RUN] != 0, tl.minimum(first + run * TILE, geometry[5]), first)
    step = c[f.T].to(tl.int32)
    turn = shuffled(step, MOMENT_TURNS)
    first_row = tl.load(row_of + f.FIRST_ROW).to(tl.int32)
    p_at, stored_at = parameter_of(row_of, P_TYPE, K_TYPE, ALIGN)
    g_at = gradient_of(gradients, tensor, G_TYPE, ALIGN)
    v_data = tl.load(row_of + f.DATA0)
    m_data = tl.load(row_of + f.DATA1)
    x_data = tl.load(row_of + f.DATA2)
    v_aux = tl.load(row_of + f.AUX0)
    m_aux = tl.load(row_of + f.AUX1)
    x_aux = tl.load(row_of + f.AUX2)
    v_key = tl.load(row_of + f.KEY0).to(tl.uint32)
    m_key = tl.load(row_of + f.KEY1).to(tl.uint32)
    x_key = tl.load(row_of + f.KEY2).to(tl.uint32)
    beside_key = tl.load(row_of + f.BESIDE_KEY).to(tl.uint32)
    for start in range(first, last, TILE):
        block = start + tl.arange(0, TILE)
        row, column, mask, where = place(geometry, block, WIDTH, HALVES, ALIGN, WHOLE)
        at = where[0]
        live = where[5]
        g = load_gradient(g_at, at, mask, c)
        p = load_parameter(p_at, stored_at, at, mask, MASTER, P_TYPE)
        before = p
        v = g
        m = g
        x = g
        if V:
            v = load_moment(v_data, v_aux, where, mask, V_KIND, False, WIDTH, ALIGN)
        if MEANS >= _FACTORS:
            v = load_factors(row_of, means, row, column, at, live, mask, 0, INVERSE, WIDTH, MEANS)
        elif MEANS != _NO_MEANS:
            v = load_row_means(row_of, row, column, live, mask, WIDTH, MEANS)
        if M:
            m = load_moment(m_data, m_aux, where, mask, M_KIND, True, WIDTH, ALIGN)
        if RESIDUAL:
            x = load_factors(row_of, means, row, column, at, live, mask, 2, True, WIDTH, MEANS)
        elif X:
            x = load_moment(x_data, x_aux, where, mask, X_KIND, X_SIGNED, WIDTH, ALIGN)
        p, v, m, x = RULE(p, g, v, m, x, c, M, X, MEANS != _NO_MEANS, PRECISE)
        if LOOKAHEAD:
            p = look_ahead(row_of, at, mask, before, p, c, ALIGN)
        w = block
        row += first_row
        if MASTER == STOCHASTIC or MASTER == SPLIT8:
            w = words(beside_key, shuffled(step, MASTER_TURNS), row, column, WIDTH)
        store_parameter(p_at, stored_at, at, mask, p, w, MASTER, P_TYPE)
        if V:
            keep_moment(v_data, v_aux, v_key, turn, row, column, where, mask, v, V_KIND, False, WIDTH, ALIGN, WHOLE)
        if M:
            keep_moment(m_data, m_aux, m_key, step, row, column, where, mask, m, M_KIND, True, WIDTH, ALIGN, WHOLE)
        if X and not RESIDUAL:
            keep_moment(x_data, x_aux, x_key, turn, row, column, where, mask, x, X_KIND, X_SIGNED, WIDTH, ALIGN, WHOLE)


@triton.jit(do_not_specialize=["run"])
def sums_kernel(
    table,  # int64 [tensors, FIELDS]
    gradients,  # int64 [tensors]: addresses
    scalars,  # fp32 [tensors, SCALARS]
    map,  # int32 [programs, 2]: tensor, first block
    run,  # tiles of one program
    sums,  # out: fp64 [programs, 2]: of p² and of the squares of SUM
    means,  # fp32: two of every matrix with a factored moment
    SUM: tl.constexpr,
    M: tl.constexpr,  # whether SUM takes the signed moment
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    V_KIND: tl.constexpr,
    M_KIND: tl.constexpr,
    X_KIND: tl.constexpr,
    HALVES: tl.constexpr,
    MEANS: tl.constexpr,
    INVERSE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISE: tl.constexpr,
    MASTER: tl.constexpr,
    K_TYPE: tl.constexpr,
):
    """What a rule needs to know of a tensor one of whose moments is kept element by element."""
    tensor, row_of, first = find(table, map)
    c = load_scalars(scalars + tensor * f.SCALARS)
    geometry = load_geometry(row_of)
    p_at, stored_at = parameter_of(row_of, P_TYPE, K_TYPE, ALIGN)
    g_at = gradient_of(gradients, tensor, G_TYPE, ALIGN)
    v_data = tl.load(row_of + f.DATA0)
    v_aux = tl.load(row_of + f.AUX0)
    m_data = tl.load(row_of + f.DATA1)
    m_aux = tl.load(row_of + f.AUX1)
    squares = tl.zeros((TILE, WIDTH), tl.float32)
    terms = tl.zeros((TILE, WIDTH), tl.float32)
    last = tl.where(c[f.RUN] != 0, tl.minimum(first + run * TILE, geometry[5]), first)
    for start in range(first, last, TILE):
        block = start + tl.arange(0, TILE)
        row, column, mask, where = place(geometry, block, WIDTH, HALVES, ALIGN, WHOLE)
        at = where[0]
        g = load_gradient(g_at, at, mask, c)
        p = load_parameter(p_at, stored_at, at, mask, MASTER, P_TYPE)
        if MEANS >= _FACTORS:
            v = load_factors(row_of, means, row, column, at, where[5], mask, 0, INVERSE, WIDTH, MEANS)
        else:
            v = load_moment(v_data, v_aux, where, mask, V_KIND, False, WIDTH, ALIGN)
        m = g
        if M:
            m = load_moment(m_data, m_aux, where, mask, M_KIND, True, WIDTH, ALIGN)
        u = SUM(p, g, v, m, c, MEANS >= _FACTORS, PRECISE)
        squares += p * p
        terms += tl.where(mask, u * u, 0.0)
    tl.store(sums + tl.program_id(0) * 2, tl.sum(tl.sum(squares, 1), 0).to(tl.float64))
    tl.store(sums + tl.program_id(0) * 2 + 1, tl.sum(tl.sum(terms, 1), 0).to(tl.float64))
