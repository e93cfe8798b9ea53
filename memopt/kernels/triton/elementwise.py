"""The element-wise step, one template for every rule and format: decode -> rule -> encode, over many tensors.

A tensor is cut into blocks: WIDTH columns of one row, which is a block of the format where that has blocks. A program
takes ``run`` tiles of TILE blocks each of one tensor, and finds in ``map`` which. Everything that differs from step to
step is read from device memory, so nothing is compiled again and nothing is asked of the host.
"""

import triton
import triton.language as tl

from memopt.kernels.triton import fields as f
from memopt.kernels.triton.codes import FULL, NIBBLES, load_moment, pointer, store_moment
from memopt.kernels.triton.masters import NONE, SPLIT8, STOCHASTIC, read_master, write_master
from memopt.kernels.triton.noise import words
from memopt.kernels.triton.rules import raw_update


@triton.jit
def load_scalars(at):
    """The row of ``scalars`` as a tuple; what a rule does not use is not loaded."""
    return (
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5),
        tl.load(at + 6), tl.load(at + 7), tl.load(at + 8), tl.load(at + 9), tl.load(at + 10), tl.load(at + 11),
        tl.load(at + 12), tl.load(at + 13), tl.load(at + 14), tl.load(at + 15), tl.load(at + 16), tl.load(at + 17),
        tl.load(at + 18), tl.load(at + 19), tl.load(at + 20), tl.load(at + 21), tl.load(at + 22), tl.load(at + 23),
        tl.load(at + 24), tl.load(at + 25), tl.load(at + 26), tl.load(at + 27), tl.load(at + 28),
    )  # fmt: skip


@triton.jit
def load_geometry(table_row):
    """Columns, blocks of a row, the division by them, elements, and blocks; before the loop, since stores may alias."""
    return (
        tl.load(table_row + f.COLS),
        tl.load(table_row + f.PER_ROW).to(tl.int32),
        tl.load(table_row + f.MAGIC).to(tl.uint32),
        tl.load(table_row + f.SHIFT).to(tl.uint32),
        tl.load(table_row + f.NUMEL),
        tl.load(table_row + f.BLOCKS).to(tl.int32),
    )


@triton.jit
def load_parameter(p_at, kept_at, at, mask, MASTER: tl.constexpr, P_TYPE: tl.constexpr):
    """fp32: the parameter, with what its master keeps."""
    p = tl.load(p_at + at, mask=mask, other=0.0).to(tl.float32)
    if MASTER != NONE and MASTER != STOCHASTIC:
        p = read_master(p, tl.load(kept_at + at, mask=mask, other=0), MASTER, P_TYPE)
    return p


@triton.jit
def store_parameter(p_at, kept_at, at, mask, x, w, MASTER: tl.constexpr, P_TYPE: tl.constexpr):
    p, kept = write_master(x, w, MASTER, P_TYPE)
    tl.store(p_at + at, p, mask=mask)
    if MASTER != NONE and MASTER != STOCHASTIC:
        tl.store(kept_at + at, kept, mask=mask)


@triton.jit
def place(geometry, block, WIDTH: tl.constexpr, KIND: tl.constexpr, ALIGN: tl.constexpr, WHOLE: tl.constexpr):
    """Where blocks are: row and first column [blocks], offsets and mask [blocks, WIDTH], and those of packed bytes.

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
    if KIND == NIBBLES:
        half = tl.arange(0, WIDTH // 2)[None, :]
        line = row.to(tl.int64) * ((cols + 1) // 2) + column // 2
        half_at = tl.multiple_of(line, ALIGN // 2 if ALIGN > 1 else 1)[:, None] + half
        half_live = live[:, None]
        if not WHOLE:
            half_live = half_live & (half * 2 < left[:, None])
    return row, column, at, mask, half_at, half_live, live


@triton.jit(do_not_specialize=["run"])
def step_kernel(
    table,  # int64 [tensors, FIELDS]
    gradients,  # int64 [tensors]: addresses
    scalars,  # fp32 [tensors, SCALARS]
    map,  # int32 [programs, 2]: tensor, first block
    run,  # tiles of one program
    RULE: tl.constexpr,
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    KIND: tl.constexpr,
    V: tl.constexpr,  # which moments there are
    M: tl.constexpr,
    X: tl.constexpr,
    X_SIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISE: tl.constexpr,
    MASTER: tl.constexpr,
    K_TYPE: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(map + program * 2).to(tl.int64)
    first = tl.load(map + program * 2 + 1)
    row_of = table + tensor * f.FIELDS
    c = load_scalars(scalars + tensor * f.SCALARS)
    geometry = load_geometry(row_of)
    last = tl.where(c[f.RUN] != 0, tl.minimum(first + run * TILE, geometry[5]), first)
    step = c[f.T].to(tl.int32)
    first_row = tl.load(row_of + f.FIRST_ROW).to(tl.int32)
    p_at = pointer(tl.load(row_of + f.P), P_TYPE, ALIGN)
    kept_at = pointer(tl.load(row_of + f.BESIDE), K_TYPE, ALIGN)
    g_at = pointer(tl.load(gradients + tensor), G_TYPE, ALIGN)
    v_data = tl.load(row_of + f.DATA0)
    m_data = tl.load(row_of + f.DATA1)
    x_data = tl.load(row_of + f.DATA2)
    v_aux = tl.load(row_of + f.AUX0)
    m_aux = tl.load(row_of + f.AUX1)
    x_aux = tl.load(row_of + f.AUX2)
    v_key = tl.load(row_of + f.KEY0).to(tl.uint32)
    m_key = tl.load(row_of + f.KEY1).to(tl.uint32)
    x_key = tl.load(row_of + f.KEY2).to(tl.uint32)
    for start in range(first, last, TILE):
        block = start + tl.arange(0, TILE)
        row, column, at, mask, half_at, half_live, live = place(geometry, block, WIDTH, KIND, ALIGN, WHOLE)
        g = tl.load(g_at + at, mask=mask, other=0.0).to(tl.float32) * c[f.SIGN]
        p = load_parameter(p_at, kept_at, at, mask, MASTER, P_TYPE)
        v = g
        m = g
        x = g
        if V:
            v = load_moment(v_data, v_aux, at, half_at, block, live, half_live, mask, KIND, False, ALIGN)
        if M:
            m = load_moment(m_data, m_aux, at, half_at, block, live, half_live, mask, KIND, True, ALIGN)
        if X:
            x = load_moment(x_data, x_aux, at, half_at, block, live, half_live, mask, KIND, X_SIGNED, ALIGN)
        p, v, m, x = RULE(p, g, v, m, x, c, M, X, False, PRECISE)
        w = block
        row += first_row
        if MASTER == STOCHASTIC or MASTER == SPLIT8:
            w = words(tl.load(row_of + f.BESIDE_KEY).to(tl.uint32), step, row, column, WIDTH)
        store_parameter(p_at, kept_at, at, mask, p, w, MASTER, P_TYPE)
        if V:
            if KIND != FULL:
                w = words(v_key, step, row, column, WIDTH)
            if not WHOLE:
                v = tl.where(mask, v, 0.0)
            store_moment(v_data, v_aux, at, half_at, block, live, half_live, mask, v, w, KIND, False, ALIGN)
        if M:
            if KIND != FULL:
                w = words(m_key, step, row, column, WIDTH)
            if not WHOLE:
                m = tl.where(mask, m, 0.0)
            store_moment(m_data, m_aux, at, half_at, block, live, half_live, mask, m, w, KIND, True, ALIGN)
        if X:
            if KIND != FULL:
                w = words(x_key, step, row, column, WIDTH)
            if not WHOLE:
                x = tl.where(mask, x, 0.0)
            store_moment(x_data, x_aux, at, half_at, block, live, half_live, mask, x, w, KIND, X_SIGNED, ALIGN)


@triton.jit(do_not_specialize=["run"])
def sums_kernel(
    table,  # int64 [tensors, FIELDS]
    gradients,  # int64 [tensors]: addresses
    scalars,  # fp32 [tensors, SCALARS]
    map,  # int32 [programs, 2]: tensor, first block
    run,  # tiles of one program
    sums,  # out: fp64 [programs, 2]: of p² and of the squared updates
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISE: tl.constexpr,
    MASTER: tl.constexpr,
    K_TYPE: tl.constexpr,
):
    """What Adafactor and CAME need to know of a tensor whose second moment is kept element by element."""
    program = tl.program_id(0)
    tensor = tl.load(map + program * 2).to(tl.int64)
    first = tl.load(map + program * 2 + 1)
    row_of = table + tensor * f.FIELDS
    c = load_scalars(scalars + tensor * f.SCALARS)
    geometry = load_geometry(row_of)
    p_at = pointer(tl.load(row_of + f.P), P_TYPE, ALIGN)
    kept_at = pointer(tl.load(row_of + f.BESIDE), K_TYPE, ALIGN)
    g_at = pointer(tl.load(gradients + tensor), G_TYPE, ALIGN)
    v_data = tl.load(row_of + f.DATA0)
    v_aux = tl.load(row_of + f.AUX0)
    squares = tl.zeros((TILE, WIDTH), tl.float32)
    updates = tl.zeros((TILE, WIDTH), tl.float32)
    for start in range(first, tl.minimum(first + run * TILE, geometry[5]), TILE):
        block = start + tl.arange(0, TILE)
        _row, _column, at, mask, half_at, half_live, live = place(geometry, block, WIDTH, KIND, ALIGN, WHOLE)
        g = tl.load(g_at + at, mask=mask, other=0.0).to(tl.float32) * c[f.SIGN]
        p = load_parameter(p_at, kept_at, at, mask, MASTER, P_TYPE)
        v = load_moment(v_data, v_aux, at, half_at, block, live, half_live, mask, KIND, False, ALIGN)
        u, _v = raw_update(g, v, c, False, PRECISE)
        squares += p * p
        updates += tl.where(mask, u * u, 0.0)
    tl.store(sums + program * 2, tl.sum(tl.sum(squares, 1), 0).to(tl.float64))
    tl.store(sums + program * 2 + 1, tl.sum(tl.sum(updates, 1), 0).to(tl.float64))
