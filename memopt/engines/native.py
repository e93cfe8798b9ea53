"""The native engine: our rules on our formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, final

from memopt.core import dither
from memopt.core.ledger import Line
from memopt.core.rows import Rows, Shape
from memopt.engines.base import Engine
from memopt.engines.row_chunks import PIECE, pieces
from memopt.formats import FORMATS, Format, Shard
from memopt.masters.base import ORDER
from memopt.rules import Moment
from memopt.rules.matrices import matrices

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from memopt.layout.param import ParamLayout
    from memopt.layout.param_step import Work
    from memopt.partitions import Partition
    from memopt.spec import OptimSpec


#: In the place of a moment's number, for what a rule draws itself.
DRAWN = 0x10000
#: A tensor here to what it is over all ranks: a sum, or what becomes of the whole matrix.
Ask = Callable[["Tensor"], "Tensor"]


@final
class ParameterState:
    """The :class:`memopt.rules.base.State` of one parameter in one step: decodes on read, encodes on write."""

    __slots__ = ("_counted", "_dtype", "_moments", "_rows", "_shard", "_state", "_sums", "_total", "_whole", "key")

    def __init__(self, work: Work, total: Ask, whole: Ask, seed: int, dtype: torch.dtype) -> None:
        self._state = work.state
        self._dtype = dtype
        self._total, self._whole = total, whole
        self._rows, self._counted, self._sums = work.rows, work.counted, work.sums
        self._moments = {m.moment.name: m for m in work.layout.moments}
        self.key = dither.key(seed, work.index, DRAWN)
        self._shard = {
            name: Shard(work.rows, dither.key(seed, work.index, j), m.moment.turn(work.step), total, work.counted)
            for j, (name, m) in enumerate(self._moments.items())
        }

    def read(self, name: str) -> Tensor:
        m = self._moments[name]
        return m.format.read(m.parts(self._state), m.moment, self._shard[name]).to(self._dtype)

    def write(self, name: str, value: Tensor, floor: float = 0.0) -> Tensor:
        m = self._moments[name]
        parts = m.parts(self._state)
        return m.format.write(value.float(), parts, m.moment, self._shard[name], floor).to(self._dtype)

    @property
    def shape(self) -> Shape:
        return self._rows.shape

    def orthogonal(self, x: Tensor) -> Tensor:
        return self._whole(x)

    def column_sums(self, x: Tensor) -> Tensor:
        """Summed in fp64, where the order of a sum, and so the number of ranks, hardly ever shows in the result."""
        import torch

        if matrices(self._rows.shape).stacked:  # of a stack, every rank has whole matrices
            return x.sum(-2, keepdim=True, dtype=torch.float64)
        return self._total(x[:, self._counted].sum(-2, keepdim=True, dtype=torch.float64))

    def left_product(self, columns: Callable[[int, int], Tensor], x: Tensor) -> Tensor:
        """The same of products, in pieces of the columns of ``x``: their temporaries do not grow with it."""
        import torch

        if matrices(self._rows.shape).stacked:
            a = columns(0, x.shape[1])
            found = a.new_empty(len(x), len(a), x.shape[2])
            for one, into in zip(x, found, strict=True):
                torch.mm(a, one.double(), out=into)
            return found
        first, stop = self._rows.bounds
        a, here = columns(first, stop)[:, self._counted], x[0][self._counted]
        found = a.new_empty(1, len(a), x.shape[2])
        step = max(PIECE // max(len(here), 1), 1)
        for at in range(0, x.shape[2], step):
            torch.mm(a, here[:, at : at + step].double(), out=found[0, :, at : at + step])
        return self._total(found)

    def report(self, numbers: Sequence[Tensor]) -> None:
        import torch

        self._sums += torch.stack([x.to(self._sums) for x in numbers])

    def rank_one(self, name: str) -> bool:
        return self._moments[name].format.name == "factored"

    def rms(self, x: Tensor) -> Tensor:
        """Root mean square over the whole parameter, in ``x``'s dtype []. Summed in fp64, where the order of a sum, and
        so the number of ranks, hardly ever shows in the result."""
        import torch

        rows = self._rows
        total = self._total(x[self._counted].square().sum(dtype=torch.float64))
        return (total / max(Rows.whole(rows.shape).numel, 1)).sqrt().to(x.dtype)


@final
class Native(Engine):
    """Decode each moment to fp32, apply the rule, encode again; on a CPU in kernels that do the same."""

    name = "native"
    summary = "memopt's own formats and rules"

    def refuse(self, spec: OptimSpec) -> str | None:
        return None

    def refuse_hyper(self, spec: OptimSpec, h: Mapping[str, Any]) -> str | None:
        return None

    def require(self) -> None:
        pass

    def refuse_rows(self, rows: Rows) -> str | None:
        return None

    def code_of(self, moment: Moment, asked: str) -> tuple[Moment, Format]:
        return moment, FORMATS[asked]

    def shared_lines(self, lines: Sequence[Line]) -> list[Line]:
        return []

    def step(self, works: Sequence[Work], partition: Partition, seed: int) -> None:
        from memopt import kernels

        ranks = partition.world_size
        # Those that need something of the other ranks, or are the better for company: matrices.
        shared = [
            work.layout.rule.whole_matrices or (bool(work.groups) and kernels.needs_ranks(work.layout, ranks))
            for work in works
        ]
        for work in kernels.step([w for w, its in zip(works, shared, strict=True) if not its], 1, seed):
            plain_step(work, lambda x: x, seed)
        if any(shared):
            from memopt.engines.matrices import numel, orthogonal, step_in_kernels
            from memopt.partitions.batched_allreduce import ParamUpdate, Total, run_together

            def update(work: Work) -> ParamUpdate:
                def run(total: Total, whole: Total) -> None:
                    if kernels.step([work], ranks, seed, total):
                        plain_step(work, total, seed, whole)

                whole = Rows.whole(work.rows.shape).numel if work.shares else 0
                return ParamUpdate(run, work.groups, numel(work, ranks), work.p.device, work, whole)

            together = [work for work, its in zip(works, shared, strict=True) if its]
            matrices = [work.layout.rule.whole_matrices for work in together]
            run_together([update(work) for work, its in zip(together, matrices, strict=True) if not its], orthogonal)
            run_together(
                [update(work) for work, its in zip(together, matrices, strict=True) if its],
                orthogonal,
                partial(step_in_kernels, seed=seed),
            )

    def slow_path(self, layout: ParamLayout, p: Tensor, ranks: int, cut_row: bool) -> str | None:
        from memopt import kernels

        return kernels.slow_path(layout, p, ranks, cut_row)

    def explain(self) -> str:
        from memopt import kernels

        return kernels.status()


def plain_step(work: Work, total: Ask, seed: int, whole: Ask | None = None) -> None:
    """The definition of every rule × format × master. Parameters under 32 bits are updated in fp32 and rounded back.
    Rules that look at each element alone go through a large parameter in pieces. ``total`` adds up over ranks,
    ``whole``
    answers a rule of matrices; without it the matrix is here."""

    def alone(x: Tensor) -> Tensor:
        from memopt.engines.matrices import orthogonal

        return orthogonal([(work, x)])[0]

    for piece in pieces(work):
        _plain_piece(piece, total, whole or alone, seed)


def _plain_piece(work: Work, total: Ask, whole: Ask, seed: int) -> None:
    import torch

    p, rule, master = work.p, work.layout.rule, work.layout.master
    wide = p.dtype in (torch.float32, torch.float64)
    dtype = p.dtype if wide else torch.float32
    g = (work.g if work.scale == 1 else work.g * work.scale).to(dtype)
    if work.h["maximize"]:
        g = g.neg()
    state = ParameterState(work, total, whole, seed, dtype)
    if wide:
        rule.step(p, g, state, work.step, work.h)
        return
    stored = work.state.get(master.key)
    exact = master.read(p, stored)
    rule.step(exact, g, state, work.step, work.h)
    master.write(exact, p, stored, Shard(work.rows, dither.key(seed, work.index, ORDER), work.step, total))
