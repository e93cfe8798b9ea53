"""Tensor and expert parallelism: which dimension of a parameter is cut, by its name, and the rows that a rank holds.

Column-parallel layers are cut by their outputs and row-parallel ones by their inputs, embedding and head by the
vocabulary (Shoeybi et al., "Megatron-LM", 2019; torch's ``ColwiseParallel`` and ``RowwiseParallel``). Experts that are
stacked in one parameter are cut by experts. Everything else is whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from memopt.core.hyperparameters import SpecError
from memopt.core.rows import Rows, Shape

if TYPE_CHECKING:
    from memopt.partitions import Partition

#: The last part of modules' names in transformers, torchtitan and LitGPT: of those that are cut by their outputs, by
#: their inputs, and of tables that are cut by the vocabulary.
_COLUMN = """q_proj k_proj v_proj qkv_proj gate_proj up_proj gate_up_proj c_attn c_fc query_key_value dense_h_to_4h fc1
fc_in wi wi_0 wi_1 wq wk wv w1 w3 query key value q k v qkv fc fc_1 fc_2"""
_ROW = "o_proj down_proj c_proj dense_4h_to_h fc2 fc_out wo w2 out_proj out_lin lin2 o proj dense"
_VOCABULARY = "embed_tokens lm_head embed_in embed_out wte word_embeddings tok_embeddings output shared"
COLUMN, ROW, VOCABULARY = (frozenset(names.split()) for names in (_COLUMN, _ROW, _VOCABULARY))


class Cut(NamedTuple):
    """``dims`` are dimensions that are cut, each with its degree; ``ranks``: by how much fewer data-parallel ranks
    share what is left, because expert parallelism takes its ranks from them."""

    dims: tuple[tuple[int, int], ...]
    ranks: int = 1

    def local(self, shape: Shape) -> Shape:
        """The shape of what the first rank holds."""
        sizes = list(shape)
        for dim, degree in self.dims:
            sizes[dim] = -(-sizes[dim] // degree)
        return tuple(sizes)


def cuts(shapes: Mapping[str, Shape], tp: int = 1, ep: int = 1) -> dict[str, Cut]:
    """How each parameter is cut that is; raises SpecError where a dimension does not come out even (that of a
    vocabulary may be ragged).

    >>> cuts({"h.0.q_proj.weight": (8, 4), "h.0.o_proj.weight": (4, 8), "norm.weight": (4,)}, tp=2)
    {'h.0.q_proj.weight': Cut(dims=((0, 2),), ranks=1), 'h.0.o_proj.weight': Cut(dims=((1, 2),), ranks=1)}
    """
    turned = _turned(shapes.items())
    found: dict[str, Cut] = {}
    for name, shape in shapes.items():
        module, _, _ = name.rpartition(".")
        part = module.rpartition(".")[2]
        dims: list[tuple[int, int]] = []
        expert = _is_expert(name, shape)
        if expert and ep > 1:
            dims.append((0, ep))
        if tp > 1 and expert:
            at = _of_expert(name, shape)
            dims += [(at, tp)] if at else []
        elif tp > 1:
            if part in VOCABULARY:
                found[name] = Cut(((0, tp),))
                continue
            if shape and (part in COLUMN or module.endswith("intermediate.dense")):  # BERT's first half of an MLP
                dims.append((len(shape) - 1 if turned and part in ("c_attn", "c_fc") else 0, tp))
            elif part in ROW and len(shape) == 2:
                dims.append((0 if turned and part == "c_proj" else 1, tp))
        for dim, degree in dims:
            if shape[dim] % degree:
                axis = "ep" if expert and dim == 0 else "tp"
                raise SpecError(f"{axis}={degree} does not divide dimension {dim} of {name}, which is {shape[dim]}")
        if dims:
            found[name] = Cut(tuple(dims), ep if expert and ep > 1 else 1)
    return found


def _turned(entries: Iterable[tuple[str, Shape]]) -> bool:
    """Whether matrices are stored as [inputs, outputs]: transformers' Conv1D."""
    return any(name.endswith("attn.c_attn.weight") and len(s) == 2 and s[0] < s[1] for name, s in entries)


def _is_expert(name: str, shape: Shape) -> bool:
    """A parameter in which the experts of a layer are stacked."""
    return ".experts." in name and len(shape) >= 2 and not name.rpartition(".experts.")[2][:1].isdigit()


def _of_expert(name: str, shape: Shape) -> int:
    """The dimension of stacked experts that tensor parallelism cuts; 0: none."""
    if len(shape) == 2:
        return 1 if "gate_up" in name or "up_proj" in name else 0
    out = "gate_up" in name or "up_proj" in name or "gate_proj" in name
    return 1 if out else 2 if "down" in name else 0


def cut_rows(
    partition: type[Partition], shapes: Mapping[str, Shape], rank: int, size: int, tp: int, ep: int
) -> dict[str, Rows]:
    """The rows that ``rank`` of ``size`` data-parallel ranks holds of each parameter that is cut, by name: those of the
    first of the ranks among which it is.

    Sharded parameters are DTensors, whose layout depends on the global shape: a slab of dimensions other than the
    first, and a range of rows of the whole. Replicated ones are cut into plain tensors, each a parameter of its own.
    """
    from memopt.partitions.fsdp import Sharded

    found = {}
    for name, cut in cuts(shapes, tp, ep).items():
        local, shape = cut.local(shapes[name]), shapes[name]
        rows = partition.rows(local, rank // cut.ranks, max(1, size // cut.ranks))
        if issubclass(partition, Sharded) and any(dim == 0 for dim, _ in cut.dims):
            rows = rows._replace(shape=(shape[0], *local[1:]))
        found[name] = rows
    return found
