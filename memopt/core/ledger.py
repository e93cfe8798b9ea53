"""What state costs, line by line. The optimizer allocates from these lines and the calculator sums them."""

# Without `from __future__ import annotations`: string annotations on a NamedTuple cost a millisecond of start-up.
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any, NamedTuple

#: Bytes of one element. Names are torch's, without the prefix.
ITEMSIZE = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
}


class TensorSpec(NamedTuple):
    """A tensor that does not exist yet: dtype (torch's name, without the prefix) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]


def dtype_name(tensor: Any) -> str:
    """torch's name of a tensor's dtype, without the prefix."""
    return str(tensor.dtype).removeprefix("torch.")


class Line(NamedTuple):
    """One tensor of state.

    ``parameter`` is the parameter's name, ``moment`` what the rule calls it (``exp_avg``), ``part`` which tensor
    of the encoded moment it is (``codes``, ``scales``; empty where the moment is one tensor). ``location`` says
    where the bytes are (``cpu``, ``cuda:0``, ``paged:cpu``), ``lifetime`` how long they stay: ``persistent`` for
    state, ``shared`` for a table that all parameters use.

    >>> Line("w", "exp_avg", "codes", "uint8", (256, 256), 65536, "cpu").key
    'exp_avg.codes'
    """

    parameter: str
    moment: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    location: str
    lifetime: str = "persistent"

    @property
    def key(self) -> str:
        """The key under which the tensor stands in ``optimizer.state[p]``."""
        return f"{self.moment}.{self.part}" if self.part else self.moment


class Ledger:
    """An immutable list of :class:`Line`; ``nbytes`` is their sum. ``str()`` of it is a table by moment.

    >>> import memopt
    >>> ledger = memopt.price([(256, 256)], "adamw-8bit")
    >>> ledger.nbytes, ledger.by("moment")["exp_avg"]
    (133124, 66560)
    """

    __slots__ = ("lines", "nbytes")

    def __init__(self, lines: Iterable[Line]) -> None:
        self.lines = tuple(lines)
        self.nbytes = sum(line.nbytes for line in self.lines)

    def __iter__(self) -> Iterator[Line]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and self.lines == other.lines

    def __hash__(self) -> int:
        return hash(self.lines)

    def by(self, *fields: str) -> dict[Any, int]:
        """Bytes summed over equal values of the named fields of :class:`Line`.

        Args:
            fields: one or more of ``parameter``, ``moment``, ``part``, ``dtype``, ``shape``, ``nbytes``, ``location``,
                ``lifetime`` and ``key``.

        Returns:
            The value of the field (of several: a tuple of values) -> bytes.

        Raises:
            ValueError: for no field, or one that lines do not have.

        >>> Ledger([Line("w", "exp_avg", "", "float32", (2,), 8, "cpu")]).by("moment")
        {'exp_avg': 8}
        """
        unknown = [f for f in fields if f not in Line._fields and f != "key"]
        if unknown or not fields:
            raise ValueError(f"by() takes fields of a line, one or more of {', '.join(Line._fields)}; got {fields!r}")
        totals: dict[Any, int] = {}
        for line in self.lines:
            values = tuple(getattr(line, f) for f in fields)
            group = values if len(values) > 1 else values[0]
            totals[group] = totals.get(group, 0) + line.nbytes
        return totals

    def to_json(self) -> dict[str, Any]:
        """``nbytes`` and ``lines`` as plain values, for ``json.dumps``."""
        return {"nbytes": self.nbytes, "lines": [{**line._asdict(), "shape": list(line.shape)} for line in self.lines]}

    def __repr__(self) -> str:
        return f"Ledger({len(self.lines)} lines, {self.nbytes:,} bytes)"

    def __str__(self) -> str:
        """A table by moment and part; the sum is the last row."""
        rows: list[tuple[str, ...]] = [("moment", "part", "dtype", "where", "tensors", "bytes")]
        totals: dict[tuple[str, ...], list[int]] = {}
        for line in self.lines:
            entry = totals.setdefault((line.moment, line.part, line.dtype, line.location), [0, 0])
            entry[0] += 1
            entry[1] += line.nbytes
        rows += [(*key, f"{count:,}", f"{nbytes:,}") for key, (count, nbytes) in totals.items()]
        rows.append(("total", "", "", "", f"{len(self.lines):,}", f"{self.nbytes:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        align = "<<<<>>"
        return "\n".join(
            "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, align, widths, strict=True)).rstrip() for row in rows
        )
