"""Which gradients hold a NaN or an Inf: one read of each, a flag per tensor, and one for any."""

import triton
import triton.language as tl

from memopt.kernels.triton.device.codes import pointer


@triton.jit(do_not_specialize=["run", "last"])
def finite_kernel(
    gradients,  # int64 [tensors]: addresses
    numels,  # int64 [tensors]
    map,  # int32 [programs, 2]: tensor, number of its first tile
    run,  # tiles of one program
    flags,  # int32 [tensors + 1], zeros before
    last,  # tensors
    G_TYPE: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(map + program * 2).to(tl.int64)
    first = tl.load(map + program * 2 + 1).to(tl.int64)
    numel = tl.multiple_of(tl.load(numels + tensor), ALIGN)
    at = pointer(tl.load(gradients + tensor), G_TYPE, ALIGN)
    worst = tl.zeros((TILE,), tl.int32)
    for i in range(0, run):
        offset = (first + i) * TILE + tl.arange(0, TILE)
        g = tl.load(at + offset, mask=offset < numel, other=0.0).to(tl.float32)
        worst = tl.maximum(worst, g.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    bad = tl.max(worst, 0) >= 0x7F800000
    # Several programs may write the same number to the same place.
    tl.store(flags + tensor, 1, mask=bad)
    tl.store(flags + last, 1, mask=bad)
