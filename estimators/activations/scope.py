"""Which parameter an operation reads: its dtype or storage, whether it trains, and its adapter.

A family's forward pass names no parameters. An operation takes, of the parameters of its block, the first of its shape
that no operation before it took: modules are defined in the order in which they run, or have different shapes. A test
holds this against the modules of transformers.
"""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

import re
from collections.abc import Iterable
from typing import NamedTuple

from memopt.core.rows import Shape

#: A block's place in a stack: everything up to the first number that stands alone in a name.
_BLOCK = re.compile(r".*?(?:^|\.)\d+\.")
#: What PEFT adds to a module.
_ADDED = re.compile(r"\.(?:lora_\w+|modules_to_save)\.")
#: dtype or storage -> bytes of an element as an operation reads it: 4- and 8-bit weights are decoded to 16 bits.
_ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
_DECODED = 2


class Adapter(NamedTuple):
    """LoRA beside a linear layer: its rank, the bytes of one of its elements, and whether it is DoRA."""

    rank: int
    item: int
    dora: bool = False


class Parameter(NamedTuple):
    """``name`` within its block. ``storage``: ``nf4``, ``int8`` … or empty. ``copy``: PEFT's modules_to_save trains a
    copy of the module."""

    name: str
    shape: Shape
    item: int
    trains: bool
    storage: str = ""
    adapter: "Adapter | None" = None
    bias_trains: bool = False
    bias_item: int = 0


class Scope:
    """The parameters that one segment of the model may read."""

    __slots__ = ("_after", "_by_shape", "trains")

    def __init__(self, own: Iterable[Parameter], others: Iterable[Parameter] = ()) -> None:
        self._by_shape: dict[Shape, list[Parameter]] = {}
        self._after: dict[Shape, list[Parameter]] = {}
        self.trains = False
        for table, group in ((self._by_shape, own), (self._after, others)):
            for p in group:
                table.setdefault(p.shape, []).append(p)
                self.trains = self.trains or (table is self._by_shape and p.trains)

    def take(self, *shapes: Shape, name: str = "") -> "Parameter | None":
        """The next parameter that has one of these shapes: of this segment, else of another that shares it. ``name``:
        the end of its module's, where modules of one shape run in another order than they are defined in."""
        for table in (self._by_shape, self._after):
            for shape in shapes:
                left = table.get(shape)
                if left:
                    named = (i for i, p in enumerate(left) if p.name.endswith(f"{name}.weight"))
                    return left.pop(next(named, 0) if name else 0)
        return None


class Parameters(NamedTuple):
    """Of a whole model: the parameters of each block in order, and those in no block by the run of blocks that they
    stand before."""

    blocks: tuple[tuple[Parameter, ...], ...]
    roots: tuple[tuple[Parameter, ...], ...]

    def block(self, index: int) -> tuple[Parameter, ...]:
        return self.blocks[index] if index < len(self.blocks) else ()

    def root(self, index: int) -> Scope:
        """Of an end of the model: what stands before the first run of blocks (0), after it (1) …; -1: after all."""
        at = min(index, len(self.roots) - 1) if index >= 0 else len(self.roots) - 1
        return Scope(self.roots[at], [p for i, group in enumerate(self.roots) if i != at for p in group])


def parameters(entries: Iterable[tuple[str, Shape, str, bool]]) -> Parameters:
    """Of ``(name, shape, dtype, whether it trains)``."""
    blocks: dict[str, list[tuple[str, Shape, str, bool]]] = {}
    roots: list[list[tuple[str, Shape, str, bool]]] = [[]]
    at: dict[str, int] = {}  # where a module's own weight stands among the roots
    stacks: list[str] = []
    for name, shape, dtype, trains in entries:
        block = _BLOCK.match(name)
        if block:
            stack = block[0].rstrip("0123456789.")
            if stack not in stacks:
                stacks.append(stack)
                roots.append([])
            blocks.setdefault(block[0], []).append((name[len(block[0]) :], shape, dtype, trains))
            continue
        added = _ADDED.search(name)
        stem = name[: added.start()] if added else name.rpartition(".")[0]
        index = at.get(stem, len(roots) - 1)
        if not added:
            at[stem] = index
        roots[index].append((name, shape, dtype, trains))
    known: dict[tuple[tuple[str, Shape, str, bool], ...], tuple[Parameter, ...]] = {}

    def resolved(group: list[tuple[str, Shape, str, bool]]) -> tuple[Parameter, ...]:
        key = tuple(group)
        if key not in known:
            known[key] = _resolved(group)
        return known[key]

    return Parameters(tuple(resolved(g) for g in blocks.values()), tuple(resolved(g) for g in roots))


def _resolved(group: list[tuple[str, Shape, str, bool]]) -> tuple[Parameter, ...]:
    """Weights with their adapters and biases, as [out, in]: transformers' Conv1D stores [in, out]."""
    turned = any(name.endswith("attn.c_attn.weight") and shape[0] < shape[1] for name, shape, _, _ in group)
    by_name = {name: (shape, dtype, trains) for name, shape, dtype, trains in group}
    found = []
    for name, shape, dtype, trains in group:
        if _ADDED.search(name) or name.endswith("bias"):
            continue
        stem = name.removesuffix(".weight")
        a = by_name.get(f"{stem}.lora_A.default.weight")
        saved = by_name.get(f"{stem}.modules_to_save.default.weight")
        bias = by_name.get(f"{stem}.bias")
        dora = f"{stem}.lora_magnitude_vector.default.weight" in by_name
        adapter = Adapter(a[0][0], _ITEM.get(a[1], 4), dora) if a else None
        if saved:
            dtype, trains = saved[1], True
        storage = "" if dtype in _ITEM else dtype
        found.append(
            Parameter(
                name,
                shape[::-1] if turned and len(shape) == 2 else shape,
                _ITEM.get(dtype, _DECODED),
                trains,
                storage,
                adapter,
                bool(bias and bias[2]),
                _ITEM.get(bias[1], _DECODED) if bias else 0,
            )
        )
    return tuple(found)
