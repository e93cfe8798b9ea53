"""What is priced: named shapes, and how they are known."""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string, which
# takes a millisecond per class, and the calculator has to answer at once.

from collections.abc import Mapping
from typing import Any, NamedTuple

from estimators.errors import InputError
from memopt.core.rows import Shape as Shape


class Model(NamedTuple):
    """The parameters of a model, shared ones once.

    ``provenance`` is ``exact`` where every shape is known and ``assumed`` where only the count is. ``frozen`` are the
    names of parameters that do not train. ``dtypes`` maps a name to torch's name of its dtype, where the source says
    one; ``buffers`` are the bytes of tensors that are not parameters. ``notes`` are sentences for the reader.
    ``config`` is the configuration behind the shapes, where there is one: activations follow from it, by a formula, or
    by a traced step of transformers' class ``head`` or of ``module`` with ``inputs``.
    ``without`` names parts of the model that are not counted. Where tensor or expert parallelism cuts parameters,
    ``shapes`` are those of one rank, ``uncut`` the whole ones, ``cuts`` how (:mod:`memopt.layout.model_parallel`) and
    ``degrees`` those of both.
    """

    name: str
    shapes: tuple[tuple[str, Shape], ...]
    provenance: str
    frozen: frozenset[str] = frozenset()
    dtypes: Mapping[str, str] = {}
    buffers: int = 0
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = None
    head: str = ""
    module: Any = None
    inputs: Any = None
    without: tuple[str, ...] = ()
    uncut: Mapping[str, Shape] = {}
    cuts: Mapping[str, Any] = {}
    degrees: tuple[int, int] = (1, 1)

    def known(self, what: str) -> None:
        """Raises :class:`InputError` where ``what`` goes by names and shapes, and only the count is known."""
        if self.provenance == "assumed":
            raise InputError(f"{what}; a parameter count has none, name an architecture or a config.json")

    def ranks(self, name: str, world_size: int) -> int:
        """Over how many of the data-parallel ranks a parameter is sharded."""
        return max(1, world_size // self.cuts[name].ranks) if name in self.cuts else world_size
