"""Which gradients hold a NaN or an Inf: one read of each, a flag per tensor, and one for any; and if it is asked for
their norm, all of them together."""

import triton
import triton.language as tl

from memopt.kernels.triton.device.codes import pointer


@triton.jit(do_not_specialize=["run", "last"])
def finite_kernel(
    gradients,  # int64 [tensors]: addresses; 0: there is none
    numels,  # int64 [tensors]
    map,  # int32 [programs, 2]: tensor, number of its first tile
    run,  # tiles of one program
    flags,  # int32 [tensors + 1], zeros before
    last,  # tensors
    sums,  # out: fp64 [programs]: of squares
    SUMMED: tl.constexpr,
    G_TYPE: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(map + program * 2).to(tl.int64)
    first = tl.load(map + program * 2 + 1).to(tl.int64)
    address = tl.load(gradients + tensor)
    numel = tl.multiple_of(tl.where(address != 0, tl.load(numels + tensor), 0), ALIGN)
    at = pointer(address, G_TYPE, ALIGN)
    worst = tl.zeros((TILE,), tl.int32)
    squares = tl.zeros((TILE,), tl.float64)
    for i in range(0, run):
        offset = (first + i) * TILE + tl.arange(0, TILE)
        g = tl.load(at + offset, mask=offset < numel, other=0.0).to(tl.float32)
        worst = tl.maximum(worst, g.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        if SUMMED:
            wide = g.to(tl.float64)
            squares += wide * wide
    bad = tl.max(worst, 0) >= 0x7F800000
    # Several programs may write the same number to the same place.
    tl.store(flags + tensor, 1, mask=bad)
    tl.store(flags + last, 1, mask=bad)
    if SUMMED:
        tl.store(sums + program, tl.sum(squares, 0))


@triton.jit(do_not_specialize=["count"])
def norm_kernel(sums, count, grad_scale, norm, SPAN: tl.constexpr):
    """fp32 [1]: the norm of all gradients, without torch.amp.GradScaler's scale. One program, in order: the bits are
    the same in every run."""
    total = tl.zeros((SPAN,), tl.float64)
    for start in range(0, count, SPAN):
        at = start + tl.arange(0, SPAN)
        total += tl.load(sums + at, mask=at < count, other=0.0)
    inverse = (1.0 / tl.load(grad_scale).to(tl.float64)).to(tl.float32).to(tl.float64)
    tl.store(norm, (tl.sqrt(tl.sum(total, 0)) * inverse).to(tl.float32))
