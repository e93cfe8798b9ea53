"""A tensor without elements, and one operation on such."""

from __future__ import annotations

from collections.abc import Sequence

FP32, INT64, BOOL = 4, 8, 1


class Tensor:
    """A tensor without elements. ``requires`` says whether a gradient flows to it; ``base`` is the tensor of which it
    is a view, whose memory it has."""

    __slots__ = ("base", "item", "numel", "requires")

    def __init__(self, numel: int, item: int, requires: bool = True, base: Tensor | None = None) -> None:
        self.numel = numel
        self.item = item
        self.requires = requires
        self.base = base

    @property
    def nbytes(self) -> int:
        return self.numel * self.item

    @property
    def stored(self) -> Tensor:
        """The tensor whose memory this one has."""
        return self.base or self


class Op:
    """One operation: what it reads, makes and saves.

    ``gradients`` are the bytes of parameter gradients that its backward makes, ``forward_tmp`` and ``backward_tmp``
    what it allocates and frees inside. ``alias``: the gradient of the result is, without a copy, that of inputs of its
    size, and with ``expands`` of larger ones too. ``products`` are what selective checkpointing keeps of it: the result
    of a matrix product, and the statistics that fused attention makes beside it. ``views`` are further results, which
    are views of what it reads as the first one is: the gradients of all of them are joined.
    """

    __slots__ = (
        "alias",
        "backward_tmp",
        "expands",
        "forward_tmp",
        "gradients",
        "ins",
        "out",
        "products",
        "saved",
        "views",
    )

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
        views: Sequence[Tensor] = (),
    ) -> None:
        self.views = views
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
    def is_leaf(self) -> bool:
        """No parameter, and made of nothing that autograd follows: where it is told to require a gradient, that is
        accumulated beside it."""
        return not self.saved and not self.gradients and bool(self.ins) and not any(t.numel for t in self.ins)

    @property
    def made(self) -> Sequence[Tensor]:
        """Tensors that come into being with it, besides its result: masks, indices, statistics, converted weights."""
        read = {id(t.stored) for t in self.ins}
        return [t for t in (*self.saved, *self.products) if id(t) not in read and t is not self.out]
