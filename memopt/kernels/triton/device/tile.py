"""What every kernel over elements does with a tile of them, wherever it lies: the numbers of the step, the gradient,
the parameter with its master, and the slow weights of ``lookahead()``."""

import triton
import triton.language as tl

from memopt.kernels.triton.device import fields as f
from memopt.kernels.triton.device.codes import pointer
from memopt.kernels.triton.device.masters import NONE, STOCHASTIC, read_master, write_master
from memopt.kernels.triton.device.rules import lerp


@triton.jit
def find(table, map):
    """The tensor of this program, its row of the table, and where in the tensor the program begins."""
    program = tl.program_id(0)
    tensor = tl.load(map + program * 2).to(tl.int64)
    return tensor, table + tensor * f.FIELDS, tl.load(map + program * 2 + 1)


@triton.jit
def load_scalars(at):
    """The row of ``scalars`` as a tuple; what a rule does not use is not loaded."""
    return (
        tl.load(at),
        tl.load(at + 1),
        tl.load(at + 2),
        tl.load(at + 3),
        tl.load(at + 4),
        tl.load(at + 5),
        tl.load(at + 6),
        tl.load(at + 7),
        tl.load(at + 8),
        tl.load(at + 9),
        tl.load(at + 10),
        tl.load(at + 11),
        tl.load(at + 12),
        tl.load(at + 13),
        tl.load(at + 14),
        tl.load(at + 15),
        tl.load(at + 16),
        tl.load(at + 17),
        tl.load(at + 18),
        tl.load(at + 19),
        tl.load(at + 20),
        tl.load(at + 21),
        tl.load(at + 22),
        tl.load(at + 23),
        tl.load(at + 24),
        tl.load(at + 25),
        tl.load(at + 26),
        tl.load(at + 27),
        tl.load(at + 28),
        tl.load(at + 29),
        tl.load(at + 30),
        tl.load(at + 31),
        tl.load(at + 32),
        tl.load(at + 33),
        tl.load(at + 34),
        tl.load(at + 35),
    )


@triton.jit
def gradient_of(gradients, tensor, G_TYPE: tl.constexpr, ALIGN: tl.constexpr):
    return pointer(tl.load(gradients + tensor), G_TYPE, ALIGN)


@triton.jit
def parameter_of(row_of, P_TYPE: tl.constexpr, K_TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """The addresses of the parameter and of what its master keeps."""
    p_at = pointer(tl.load(row_of + f.P), P_TYPE, ALIGN)
    return p_at, pointer(tl.load(row_of + f.BESIDE), K_TYPE, ALIGN)


@triton.jit
def load_gradient(g_at, at, mask, c):
    """fp32: as it would be had it been scaled where it lies, in its own dtype."""
    g = tl.load(g_at + at, mask=mask, other=0.0)
    return (g.to(tl.float32) * c[f.SIGN]).to(g.dtype).to(tl.float32)


@triton.jit
def load_parameter(p_at, stored_at, at, mask, MASTER: tl.constexpr, P_TYPE: tl.constexpr):
    """fp32: the parameter, with what its master keeps."""
    p = tl.load(p_at + at, mask=mask, other=0.0).to(tl.float32)
    if MASTER != NONE and MASTER != STOCHASTIC:
        p = read_master(p, tl.load(stored_at + at, mask=mask, other=0), MASTER, P_TYPE)
    return p


@triton.jit
def store_parameter(p_at, stored_at, at, mask, x, w, MASTER: tl.constexpr, P_TYPE: tl.constexpr):
    p, stored = write_master(x, w, MASTER, P_TYPE)
    tl.store(p_at + at, p, mask=mask)
    if MASTER != NONE and MASTER != STOCHASTIC:
        tl.store(stored_at + at, stored, mask=mask)


@triton.jit
def look_ahead(row_of, at, mask, before, p, c, ALIGN: tl.constexpr):
    """The parameter after slow weights began as it was ``before`` the step, or followed it and it became them."""
    slow_at = pointer(tl.load(row_of + f.SLOW), tl.float32, ALIGN)
    begins = c[f.BEGINS] != 0
    returns = c[f.RETURNS] != 0
    slow = tl.load(slow_at + at, mask=tl.where(returns, mask, False), other=0.0)
    slow = tl.where(begins, before, slow)
    slow = tl.where(returns, lerp(slow, p, c, f.SLOW_WEIGHT), slow)
    tl.store(slow_at + at, slow, mask=tl.where(c[f.BEGINS] + c[f.RETURNS] != 0, mask, False))
    return tl.where(returns, slow, p)
