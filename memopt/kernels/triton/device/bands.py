"""Bands of HEIGHT rows by WIDTH columns, into which a matrix with a factored moment is cut: where they lie, what is
read of the moment for them, and where their sums go until they are added up."""

import triton
import triton.language as tl

from memopt.kernels.triton.device import fields as f
from memopt.kernels.triton.device.dither import MASTER_TURNS, shuffled, words

#: Rows of one band.
HEIGHT = tl.constexpr(256)


@triton.jit
def band(row_of, tile, WIDTH: tl.constexpr, ALIGN: tl.constexpr):
    """Matrix, first and last row in it, number of the band along rows and along columns, columns [WIDTH] and mask."""
    cols = tl.multiple_of(tl.load(row_of + f.LINE), ALIGN)
    height = tl.load(row_of + f.HEIGHT)
    across = tl.cdiv(cols, WIDTH).to(tl.int32)
    down = tl.cdiv(height, HEIGHT).to(tl.int32)
    along = tile % across
    first = (tile // across) % down
    matrix = (tile // across // down).to(tl.int64)
    top = first * HEIGHT
    column = along * WIDTH + tl.arange(0, WIDTH)
    return matrix, top, tl.minimum(top + HEIGHT, height).to(tl.int32), first, along, column, column < cols


@triton.jit
def vectors(row_of, means, matrix, column, inside, SLOT: tl.constexpr):
    """Of a factored moment: the address of this matrix's rows, its columns [WIDTH], its mean."""
    height = tl.load(row_of + f.HEIGHT)
    cols = tl.load(row_of + f.LINE)
    rows = tl.load(row_of + f.DATA0 + SLOT).to(tl.pointer_type(tl.float32)) + matrix * height
    col_at = tl.load(row_of + f.AUX0 + SLOT).to(tl.pointer_type(tl.float32)) + matrix * cols
    mean = tl.load(means + tl.load(row_of + f.MEANS_AT) + matrix * 2 + SLOT // 2)
    return rows, tl.load(col_at + column, mask=inside, other=0.0), mean


@triton.jit
def inverse_root(x):
    return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def rows_of(rows, mean, r, live, INVERSE: tl.constexpr):
    """row / mean [TILE], or 1 over its root"""
    row = tl.div_rn(tl.load(rows + r, mask=live, other=0.0), mean)
    return inverse_root(row) if INVERSE else row


@triton.jit
def offsets(row_of, matrix, r, live, column, inside, ALIGN: tl.constexpr):
    """int64 offsets and mask [TILE, WIDTH]"""
    cols = tl.load(row_of + f.LINE)
    start = tl.multiple_of((matrix * tl.load(row_of + f.HEIGHT) + r) * cols, ALIGN)
    return start[:, None] + column[None, :], live[:, None] & inside[None, :]


@triton.jit
def line_words(row_of, c, matrix, r, column, WIDTH: tl.constexpr):
    """The dither of a master, whose rows are those of ``memopt/core/rows.py``: several lines of the matrices each."""
    lines = tl.load(row_of + f.LINES)
    line = matrix * tl.load(row_of + f.HEIGHT) + r
    row = line // lines + tl.load(row_of + f.FIRST_ROW)
    first = (line % lines) * tl.load(row_of + f.LINE) + column
    return words(
        tl.load(row_of + f.BESIDE_KEY).to(tl.uint32), shuffled(c[f.T].to(tl.int32), MASTER_TURNS), row, first, WIDTH
    )


@triton.jit
def keep_columns(row_of, partial, matrix, first, column, inside, sums):
    cols = tl.load(row_of + f.LINE)
    total = tl.load(row_of + f.NUMEL) // tl.load(row_of + f.HEIGHT)  # columns of all matrices
    at = partial + tl.load(row_of + f.COLS_AT) + first * total + matrix * cols
    tl.store(at + column, sums, mask=inside)


@triton.jit
def keep_rows(row_of, partial, matrix, along, r, live, sums):
    total = tl.load(row_of + f.NUMEL) // tl.load(row_of + f.LINE)  # rows of all matrices
    at = partial + tl.load(row_of + f.ROWS_AT) + along * total + matrix * tl.load(row_of + f.HEIGHT)
    tl.store(at + r, sums, mask=live)
