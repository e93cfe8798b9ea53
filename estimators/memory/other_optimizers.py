"""State of optimizers that memopt does not run, for comparison: torchao's AdamW in 8 bits, 4 bits and fp8.

Read in torchao/optim/subclass_*.py (0.18). A parameter of n elements, n >= 4096 and a multiple of the block, has two
moments of codes, an fp32 scale per block and, but for fp8, two maps of its own; any other has both moments in its own
dtype. Every parameter has a step of 4 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from estimators.errors import InputError, shown
from estimators.memory.memory_row import GPU, Row
from estimators.models.model import Model

if TYPE_CHECKING:
    from memopt.spec import OptimSpec

_LEAST, _STEP = 4096, 4


class Kind(NamedTuple):
    """Elements of a block, bits of a code, bytes of the two maps."""

    block: int
    bits: int
    maps: int


TORCHAO = {"8bit": Kind(256, 8, 2 * 256 * 4), "4bit": Kind(128, 4, 2 * 16 * 4), "fp8": Kind(256, 8, 0)}


def torchao_nbytes(shapes: Iterable[tuple[int, ...]], kind: str, itemsize: int = 2) -> int:
    """Bytes of torchao's AdamW over parameters of these shapes and this itemsize.

    >>> torchao_nbytes([(4096, 4096), (4096,)], "8bit")
    34091144
    """
    if kind not in TORCHAO:
        raise InputError(f"kind={shown(kind)} is not allowed; it is one of {', '.join(TORCHAO)}")
    block, bits, maps = TORCHAO[kind]
    total = 0
    for shape in shapes:
        n = prod(shape)
        if n >= _LEAST and n % block == 0:
            total += 2 * n * bits // 8 + 2 * 4 * (n // block) + maps + _STEP
        else:
            total += 2 * n * itemsize + _STEP
    return total


#: Optimizers of other tools that have a name and no formula here -> what their state depends on.
NOT_PRICED = {
    "galore": "projections of gradients, of a rank",
    "q_galore": "projections of gradients, of a rank",
    "apollo": "projections of gradients, of a rank",
    "fira": "projections of gradients, of a rank",
    "lomo": "gradients that are stepped as they are made",
    "adalomo": "gradients that are stepped as they are made",
    "badam": "the block that is stepped",
    "lisa": "the layers that are stepped",
    "shampoo": "factors of preconditioners",
    "soap": "factors of preconditioners",
    "kron": "factors of preconditioners",
    "psgd": "factors of preconditioners",
    "muon": "which parameters are matrices",
    "sophia": "an estimate of the Hessian",
    "grokadamw": "a copy of the gradients",
    "schedule_free": "a second copy of the weights",
    "dadapt": "copies of the weights",
}


def not_priced(text: str) -> str | None:
    """One sentence about an optimizer that is known, and not priced yet; None for any other."""
    name = text.strip().lower().replace("-", "_")
    found = next((n for n in sorted(NOT_PRICED, key=len, reverse=True) if name.startswith(n)), None)
    return f"{shown(text)} is known, not priced yet: its state depends on {NOT_PRICED[found]}" if found else None


#: Names of torch's optimizers that step all parameters together (``foreach``) -> of how many fp32 copies of what trains
#: a step allocates at once: AdamW's square roots of the second moment (torch/optim/adam.py, _multi_tensor_adam).
FOREACH = {"adamw_torch": 1}


def foreach(given: Any, spec: OptimSpec, model: Model) -> list[Row]:
    """The row of such a step, where one of the names that were ``given`` for this spec is such an optimizer's."""
    named = [given] if isinstance(given, str) else given if isinstance(given, (list, tuple)) else []
    copies = max((FOREACH.get(one.lower(), 0) for one in named if isinstance(one, str)), default=0)
    if not copies:
        return []
    numel = sum(prod(shape) for name, shape in model.shapes if name not in model.frozen)
    detail = "torch's foreach: roots of a moment"
    return [Row(str(spec), "temporaries", detail, 4 * numel * copies, GPU, ("step",), "formula")]
