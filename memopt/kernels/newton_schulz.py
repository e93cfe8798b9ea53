"""The nearest orthogonal matrix, about, by Newton-Schulz iteration: products of matrices alone, in torch's own GEMM.

``torch.optim.Muon`` takes three products in each iteration, one of them twice as large as need be: a matrix n x m with
m >= n is multiplied by itself for its Gram matrix, and by a polynomial of that. All polynomials of one Gram matrix
commute, so some iterations can be taken in the n x n matrices alone, and the n x m matrix is multiplied once behind
them: with m >= 2 n that is cheaper. In bfloat16 no more than three iterations go without a look at the matrix itself:
what is small grows by a power of a, and its rounding with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Iterations in the Gram matrix before the matrix is multiplied, and the proportions from which on that pays.
IN_GRAM, WIDE = 3, 2


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

    wide = x.mT if x.shape[-2] > x.shape[-1] else x
    # In the dtype of the products, as torch.optim.Muon has it.
    for one in wide:
        one.div_(one.norm().clamp(min=h["eps"]))
    k, m = wide.shape[-2:]
    if h["ns_dtype"] != "auto":
        made = torch.stack([_plain(one, h) for one in wide]) if len(wide) > 1 else _plain(wide[0], h)[None]
    else:
        made = _in_gram(wide, h) if m >= WIDE * k else _batched(wide, h)
    return made.mT if x.shape[-2] > x.shape[-1] else made


def _plain(x: Tensor, h: Mapping[str, Any]) -> Tensor:
    import torch

    a, b, c = h["ns_coefficients"]
    for _ in range(h["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _batched(x: Tensor, h: Mapping[str, Any]) -> Tensor:
    import torch

    a, b, c = h["ns_coefficients"]
    for _ in range(h["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _in_gram(x: Tensor, h: Mapping[str, Any]) -> Tensor:
    import torch

    a, b, c = h["ns_coefficients"]
    left = h["ns_steps"]
    while left:
        some = min(left, IN_GRAM)
        left -= some
        gram, product = x @ x.mT, None
        for last in range(some - 1, -1, -1):
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # without a, which is added in the products' sums
            if last:
                gram = torch.baddbmm(gram, factor, gram, beta=a)
                gram = torch.baddbmm(gram, gram, factor, beta=a)
            if product is None:
                product = factor
                product.diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                product = torch.baddbmm(product, factor, product, beta=a)
        assert product is not None
        x = product @ x
    return x
