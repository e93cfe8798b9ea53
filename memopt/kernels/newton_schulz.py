"""The nearest orthogonal matrix, about, by Newton-Schulz iteration: products of matrices alone, in torch's own GEMM.

``torch.optim.Muon`` takes three products in each iteration, two of them as large as the matrix. All polynomials of one
Gram matrix commute, so some iterations can be taken in the k x k Gram matrices alone, k being the smaller side, and the
matrix is multiplied once behind them: where it is half as long again as it is wide that is cheaper. In bfloat16 no more
than three iterations go without a look at the matrix itself: what is small grows by a power of a, and its rounding with
it.

A high matrix is multiplied from the right, so that nothing is transposed: products with transposed operands, and an
update that lies across the parameter, cost a CPU as much again. Products that are symmetric are taken whole: half of
one, in blocks, and its copy across the diagonal take as long (measured to 1024 x 1024, bfloat16 and fp32).

Two threads: oneDNN takes a product in bfloat16 whose sides are 512 to 1024 on one of them (torch 2.13; on four threads
it uses all). Several matrices together, or the halves of one, are on both.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Iterations in the Gram matrix before the matrix is multiplied, and the proportions from which on that pays.
IN_GRAM, WIDE = 3, 1.5
#: Sides of a product that one of two threads would take alone.
ALONE = range(512, 1025)


@cache
def faster(device_type: str) -> torch.dtype:
    """The dtype in which a device multiplies matrices faster: bfloat16 where there are instructions for it."""
    import torch

    if device_type != "cpu":
        return torch.bfloat16
    has = (
        getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    )
    return torch.bfloat16 if has else torch.float32


def dtype_of(h: Mapping[str, Any], device: torch.device) -> torch.dtype:
    """The dtype in which ``ns_dtype`` has the products taken on this device."""
    import torch

    chosen = h["ns_dtype"]
    return faster(device.type) if chosen == "auto" else getattr(torch, chosen)


def newton_schulz(x: Tensor, h: Mapping[str, Any]) -> Tensor:
    """``ns_steps`` iterations for each matrix of ``x`` [count, n, m], of the dtype of the products; may use its memory.
    With ``ns_dtype="auto"`` all at once, and in fewer products where that pays; else torch.optim.Muon's products, in
    its order, one matrix after the other.

    Besides ``x`` it has at most one more such tensor and three of [count, k, k], k = min(n, m), at a time.
    """
    import torch

    rows, cols = x.shape[-2:]
    for one in x:  # in the dtype of the products, as torch.optim.Muon has it
        one.div_(one.norm().clamp(min=h["eps"]))
    if h["ns_dtype"] != "auto":
        made = [_as_torch(one, h) for one in x]
        return torch.stack(made) if len(made) > 1 else made[0][None]
    if max(rows, cols) >= WIDE * min(rows, cols):
        step = _in_gram
    elif rows > cols:  # in every iteration it would be multiplied with its transpose
        return newton_schulz_across(x, h)
    else:
        step = _iterated
    return step(x[0], h)[None] if len(x) == 1 else step(x, h)


def newton_schulz_across(x: Tensor, h: Mapping[str, Any]) -> Tensor:
    """The same of the transposes."""
    across = x.mT.contiguous()
    return (_iterated(across[0], h)[None] if len(x) == 1 else _iterated(across, h)).mT


def _as_torch(x: Tensor, h: Mapping[str, Any]) -> Tensor:
    import torch

    a, b, c = h["ns_coefficients"]
    high = x.shape[0] > x.shape[1]
    x = x.T if high else x
    for _ in range(h["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if high else x


def _iterated(x: Tensor, h: Mapping[str, Any]) -> Tensor:
    a, b, c = h["ns_coefficients"]
    for _ in range(h["ns_steps"]):
        gram = _product(x, x.mT)
        x = _plus(x, _plus(gram, gram, gram, b, c), x, a)
    return x


def _in_gram(x: Tensor, h: Mapping[str, Any]) -> Tensor:
    a, b, c = h["ns_coefficients"]
    left = h["ns_steps"]
    high = x.shape[-2] > x.shape[-1]
    while left:
        some = min(left, IN_GRAM)
        left -= some
        gram, product = _product(x.mT, x) if high else _product(x, x.mT), None
        for last in range(some - 1, -1, -1):
            factor = _plus(gram, gram, gram, b, c)  # without a, which is added in the products' sums
            if last:
                gram = _plus(gram, factor, gram, a)
                gram = _plus(gram, gram, factor, a)
            if product is None:
                product = factor
                product.diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                product = _plus(product, factor, product, a)
        assert product is not None
        x = x @ product if high else product @ x
    return x


def _product(x: Tensor, y: Tensor) -> Tensor:
    """``x y``."""
    import torch

    if not _by_halves(x, y):
        return x @ y
    found = x.new_empty(len(x), y.shape[1])
    for rows in _halves(x):
        torch.mm(x[rows], y, out=found[rows])
    return found


def _plus(x: Tensor, y: Tensor, z: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """``beta * x + alpha * y z``."""
    import torch

    if x.dim() == 3:
        return torch.baddbmm(x, y, z, beta=beta, alpha=alpha)
    if not _by_halves(y, z):
        return torch.addmm(x, y, z, beta=beta, alpha=alpha)
    found = torch.empty_like(x)
    for rows in _halves(x):
        torch.addmm(x[rows], y[rows], z, beta=beta, alpha=alpha, out=found[rows])
    return found


def _halves(x: Tensor) -> tuple[slice, slice]:
    half = len(x) // 2
    return slice(0, half), slice(half, len(x))


def _by_halves(x: Tensor, y: Tensor) -> bool:
    """Whether the halves of a product take less time than the whole."""
    import torch

    if x.dim() != 2 or x.dtype != torch.bfloat16 or x.device.type != "cpu" or torch.get_num_threads() != 2:
        return False
    (rows, inner), cols = x.shape, y.shape[1]
    return rows in ALONE and cols in ALONE and (inner <= rows or rows < ALONE[-1]) and x.stride(1) == 1
