"""What a format is: which tensors hold a moment, and the two directions of its code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from memopt.core.ledger import TensorSpec
from memopt.core.rows import MIN_NUMEL, Rows, Shape
from memopt.rules.base import Moment

if TYPE_CHECKING:
    from torch import Tensor

#: Which codes formats have: second moments in ``8bit`` were another one in "1", of which nothing was released.
CODES = "2"

#: The tensors of one encoded moment: part -> tensor.
Parts = dict[str, "Tensor"]


class Shard(NamedTuple):
    """What an encoding may know about where it stands.

    ``rows`` are the rows held here; ``key`` (of this parameter's moment) and ``step`` choose the dither of
    :mod:`memopt.core.dither`; ``total`` adds a tensor up over the ranks that hold the other rows (the identity where
    the rows are all here), and ``counted`` are the indices of dimension 0 that this rank adds to it.
    """

    rows: Rows
    key: int = 0
    step: int = 0
    total: Callable[[Tensor], Tensor] = lambda x: x
    counted: Any = ...


def too_small(shape: Shape) -> str | None:
    """Why a tensor of this global shape is not worth encoding, or None: it costs nothing as it is."""
    return f"fewer than {MIN_NUMEL} elements" if Rows.whole(shape).numel < MIN_NUMEL else None


class Format(ABC):
    """A value on the format axis. Zero bytes decode to zero. Subclasses are final.

    ``name`` is its spelling in a spec. Layout and refusals are torch-free; only ``read`` and ``write`` compute.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    #: Whether a part stands for all elements of a matrix together: then it is stepped at once, and summed over ranks.
    whole_tensor: ClassVar[bool] = False
    #: Whether it is not of the parameter's shape: then all that is here is read and written at once, as it is.
    own_shape: ClassVar[bool] = False

    @abstractmethod
    def declines(self, moment: Moment, shape: Shape) -> str | None:
        """Why this moment of a parameter of this *global* shape stays in 32 bits, or None if it is encoded."""

    @abstractmethod
    def layout(self, moment: Moment, rows: Rows) -> dict[str, TensorSpec]:
        """The tensors that hold these rows of the moment: part -> dtype and shape. A single part has no name."""

    def of_shape(self, shape: Shape) -> Shape:
        """The shape of what is read for all of a parameter of this shape."""
        return shape

    def span(self, moment: Moment, part: str, outer: Rows, inner: Rows) -> tuple[int, int] | None:
        """Where the rows ``inner`` stand along dimension 0 of the part that holds ``outer``; None is all of it.

        >>> from memopt.formats import ALL_FORMATS
        >>> ALL_FORMATS["8bit"].span(Moment("exp_avg"), "scales", Rows((1024,), 1, 4), Rows((1024,), 2, 3))
        (1, 2)
        """
        if inner == outer or self.is_shared(moment, part, outer.shape):
            return None
        start = self.layout(moment, outer._replace(stop=inner.first))[part].shape[0]
        return start, start + self.layout(moment, inner)[part].shape[0]

    def is_shared(self, moment: Moment, part: str, shape: Shape) -> bool:
        """Whether whoever holds some rows holds the whole part, as it does the column means of a matrix."""
        return _is_shared(self, moment, part, shape)

    @abstractmethod
    def read(self, parts: Parts, moment: Moment, shard: Shard) -> Tensor:
        """Decode to fp32, shape ``rows.local_shape``. The caller may change it in place."""

    @abstractmethod
    def write(self, x: Tensor, parts: Parts, moment: Moment, shard: Shard, floor: float = 0.0) -> Tensor:
        """Encode fp32 ``x`` into ``parts``; return what this step may see of it (see ``rules.base.State``)."""


@lru_cache(maxsize=1024)
def _is_shared(fmt: Format, moment: Moment, part: str, shape: Shape) -> bool:
    none, whole = Rows(shape, 0, 0), Rows.whole(shape)
    return fmt.layout(moment, none)[part].shape == fmt.layout(moment, whole)[part].shape


def as_blocks(x: Tensor, rows: Rows, block: int) -> Tensor:
    """``x`` [local_shape] as [rows, blocks per row, block], the last block of a row padded with zeros."""
    count, cols = rows.count, rows.cols
    x = _pad(x.reshape(1, x.numel()), count * cols).reshape(count, cols)  # the last row may be ragged
    width = -(-cols // block) * block
    return _pad(x, width).reshape(count, width // block, block)


def from_blocks(blocks: Tensor, rows: Rows) -> Tensor:
    """The inverse of :func:`as_blocks`: padding dropped, shape ``rows.local_shape``."""
    return as_rows(blocks, rows).reshape(-1)[: rows.numel].reshape(rows.local_shape)


def as_rows(blocks: Tensor, rows: Rows) -> Tensor:
    """Blocks as [rows, columns]: the padding of blocks dropped, not that of the last row."""
    return blocks.reshape(rows.count, blocks.shape[1] * blocks.shape[2])[:, : rows.cols]


def _pad(x: Tensor, width: int) -> Tensor:
    if x.shape[-1] == width:
        return x
    padded = x.new_zeros(*x.shape[:-1], width)
    padded[..., : x.shape[-1]] = x
    return padded
