"""A tensor without elements, and one operation on such."""

from __future__ import annotations

from collections.abc import Sequence

FP32, INT64, BOOL = 4, 8, 1


class Tensor:
    """A tensor without elements. ``requires`` says whether a gradient flows to it."""

    __slots__ = ("item", "numel", "requires")

    def __init__(self, numel: int, item: int, requires: bool = True) -> None:
        self.numel = numel
        self.item = item
        self.requires = requires

    @property
    def nbytes(self) -> int:
        return self.numel * self.item


class Op:
    """One operation: what it reads, makes and saves.

    ``gradients`` are the bytes of parameter gradients that its backward makes, ``forward_tmp`` and ``backward_tmp``
    what it allocates and frees inside. ``alias``: the gradient of the result is, without a copy, that of inputs of its
    size, and with ``expands`` of larger ones too. ``products`` are what selective checkpointing keeps of it: the result
    of a matrix product, and the statistics that fused attention makes beside it.
    """

    __slots__ = ("alias", "backward_tmp", "expands", "forward_tmp", "gradients", "ins", "out", "products", "saved")

    def __init__(
        self,
        ins: Sequence[Tensor],
        out: Tensor,
        saved: Sequence[Tensor],
        gradients: int,
        forward_tmp: int,
        backward_tmp: int,
        alias: bool,
        expands: bool,
        products: Sequence[Tensor],
    ) -> None:
        self.ins = ins
        self.out = out
        self.saved = saved
        self.gradients = gradients
        self.forward_tmp = forward_tmp
        self.backward_tmp = backward_tmp
        self.alias = alias
        self.expands = expands
        self.products = products

    @property
    def made(self) -> Sequence[Tensor]:
        """Tensors that come into being with it, besides its result: masks, indices, statistics, converted weights."""
        read = {id(t) for t in self.ins}
        return [t for t in (*self.saved, *self.products) if id(t) not in read and t is not self.out]
