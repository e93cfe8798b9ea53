"""A bare parameter count as a model of plausible shape."""

from __future__ import annotations

from estimators.models.model import Model, Shape

#: Published decoders have about 128 times as many columns as layers (Llama 7B: 4096 over 32; 70B: 8192 over 80).
_WIDTH_PER_LAYER = 128
#: Parameters of one layer, in units of the width squared: 4 in attention, 8 in the MLP.
_SQUARES_PER_LAYER = 12
_ROUND_TO = 64


def plausible_width(parameters: int) -> int:
    """The width at which ``12 · width² · layers`` parameters have ``width / 128`` layers, rounded to 64.

    >>> plausible_width(8_000_000_000), plausible_width(70_000_000_000)
    (4416, 9088)
    """
    width = (parameters * _WIDTH_PER_LAYER / _SQUARES_PER_LAYER) ** (1 / 3)
    return int(max(_ROUND_TO, round(width / _ROUND_TO) * _ROUND_TO))


def counted(parameters: int) -> Model:
    """Square matrices of a plausible width, one matrix with the rows that are left and a vector of the last few
    elements: exactly ``parameters`` elements.

    >>> sum(rows * cols for _, (rows, *rest) in counted(10_000).shapes for cols in rest or [1])
    10000
    """
    width = plausible_width(parameters)
    squares, rest = divmod(parameters, width * width)
    shapes: list[tuple[str, Shape]] = [(f"matrix.{i}", (width, width)) for i in range(squares)]
    rows, last = divmod(rest, width)
    if rows:
        shapes.append(("matrix.rest", (rows, width)))
    if last:
        shapes.append(("vector.rest", (last,)))
    note = (
        f"only the count is known: priced as {squares} square matrices of width {width} and a remainder; name an "
        "architecture or a config.json for exact shapes"
    )
    return Model(f"{parameters:,} parameters", tuple(shapes), "assumed", notes=(note,))
