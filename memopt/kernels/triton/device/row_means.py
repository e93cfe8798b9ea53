"""Second moments of which a step reads means that an earlier pass has renewed: Adam-mini's, one number for each row,
and factored ones beside moments that are in blocks."""

import triton
import triton.language as tl

from memopt.kernels.triton.device import fields as f
from memopt.kernels.triton.device.bands import inverse_root
from memopt.kernels.triton.device.tile import find, gradient_of, load_gradient, load_scalars

#: What a step kernel meets: no means, one number in each row of its view, several in a row (of a stack of matrices);
#: row and column means of one matrix, or of the matrices of a stack.
NONE, ONE, SEVERAL, FACTORS, FACTORS_OF_STACK = (tl.constexpr(i) for i in range(5))
#: Columns of a tile.
COLS = tl.constexpr(256)


@triton.jit
def row_means_kernel(
    table,  # int64 [tensors, FIELDS]
    gradients,  # int64 [tensors]: addresses
    scalars,  # fp32 [tensors, SCALARS]
    map,  # int32 [programs, 2]: tensor, number of the program in it
    ROWS: tl.constexpr,  # of a tile
    G_TYPE: tl.constexpr,
    ALIGN: tl.constexpr,  # of a row, in elements
):
    tensor, row_of, number = find(table, map)
    c = load_scalars(scalars + tensor * f.SCALARS)
    span = tl.load(row_of + f.ROW_SPAN)
    numel = tl.load(row_of + f.NUMEL)
    group = tl.load(row_of + f.ROW_GROUP).to(tl.int32)
    first = number * group
    last = tl.minimum(first + group, tl.cdiv(numel, span).to(tl.int32))
    v_at = tl.load(row_of + f.DATA0).to(tl.pointer_type(tl.float32))
    g_at = gradient_of(gradients, tensor, G_TYPE, ALIGN)
    for start in range(first, tl.where(c[f.RUN] != 0, last, first), ROWS):
        r = start + tl.arange(0, ROWS)
        live = r < last
        begin = tl.multiple_of(r.to(tl.int64) * span, ALIGN)
        size = tl.multiple_of(tl.minimum(numel - begin, span), ALIGN)  # the last row of a vector may be shorter
        squares = tl.zeros((ROWS, COLS), tl.float32)
        for column in range(0, span, COLS):
            lane = column + tl.arange(0, COLS)
            mask = live[:, None] & (lane[None, :] < size[:, None])
            g = load_gradient(g_at, begin[:, None] + lane[None, :], mask, c)
            squares += g * g
        mean = tl.div_rn(tl.sum(squares, 1), size.to(tl.float32))
        v = tl.load(v_at + r, mask=live, other=0.0)
        tl.store(v_at + r, tl.fma(mean, c[f.REST2], v * c[f.B2]), mask=live)


@triton.jit
def load_row_means(row_of, row, column, live, mask, WIDTH: tl.constexpr, KIND: tl.constexpr):
    """fp32 [blocks, 1], or [blocks, WIDTH] where numbers change within a row; ``row`` of the rows held here."""
    at = tl.load(row_of + f.DATA0).to(tl.pointer_type(tl.float32))
    if KIND == ONE:
        v = tl.load(at + row, mask=live, other=0.0)[:, None]
    else:
        span = tl.load(row_of + f.ROW_SPAN).to(tl.int32)
        first = row.to(tl.int64) * (tl.load(row_of + f.COLS) // span)
        within = (column[:, None] + tl.arange(0, WIDTH)[None, :]) // span
        v = tl.load(at + first[:, None] + within, mask=mask, other=0.0)
    return v


@triton.jit
def load_factors(
    row_of,
    means,
    row,
    column,
    at,
    live,
    mask,
    SLOT: tl.constexpr,
    INVERSE: tl.constexpr,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
):
    """fp32 [blocks, WIDTH]: row * col / mean of a factored moment, or its inverse root; ``row`` of the rows held here,
    ``at`` the offsets of the elements."""
    rows = tl.load(row_of + f.DATA0 + SLOT).to(tl.pointer_type(tl.float32))
    cols = tl.load(row_of + f.AUX0 + SLOT).to(tl.pointer_type(tl.float32))
    mean_at = means + tl.load(row_of + f.MEANS_AT) + SLOT // 2
    if KIND == FACTORS:
        lane = column[:, None] + tl.arange(0, WIDTH)[None, :]
        factor = tl.div_rn(tl.load(rows + row, mask=live, other=0.0), tl.load(mean_at))[:, None]
        col = tl.load(cols + lane, mask=mask, other=0.0)
    else:
        span = tl.load(row_of + f.LINE)
        line = at // span
        matrix = line // tl.load(row_of + f.HEIGHT)
        factor = tl.div_rn(
            tl.load(rows + line, mask=mask, other=0.0), tl.load(mean_at + matrix * 2, mask=mask, other=1.0)
        )
        col = tl.load(cols + (matrix * span + (at - line * span)), mask=mask, other=0.0)
    if INVERSE:
        return inverse_root(factor) * inverse_root(col)
    return factor * col
