"""The native engine: our rules on our formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

from memopt import noise
from memopt.engines.base import Engine
from memopt.engines.pieces import pieces
from memopt.formats import FORMATS, HELD, Format, Shard
from memopt.geometry import Rows
from memopt.ledger import Line, TensorSpec, dtype_name
from memopt.masters import master_of
from memopt.masters.base import ORDER
from memopt.partitions import PARTITIONS
from memopt.rules import RULES, Moment

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from memopt.engines.work import Work
    from memopt.partitions import Partition
    from memopt.spec import OptimSpec


def moment_formats(spec: OptimSpec, h: Mapping[str, Any], name: str, rows: Rows) -> list[tuple[Moment, Format, str]]:
    """For each moment of a parameter: the format that holds it, and why where that is not the one asked for.
    Decided from the name and the global shape only."""
    asked = FORMATS[spec.for_parameter(name)[0]]
    uncut = PARTITIONS[spec.partition].declines(rows.shape) if asked.name != "32bit" else None
    chosen = []
    for moment in RULES[spec.rule].moments(h, rows.shape):
        if moment.held:
            chosen.append((moment, HELD[moment.held], moment.held_because if moment.held != asked.name else ""))
            continue
        reason = asked.declines(moment, rows.shape) or uncut or ""
        chosen.append((moment, FORMATS["32bit"] if reason else asked, reason))
    return chosen


@final
class ParameterState:
    """The :class:`memopt.rules.base.State` of one parameter in one step: decodes on read, encodes on write."""

    __slots__ = ("_counted", "_dtype", "_moments", "_rows", "_shard", "_state", "_total")

    def __init__(
        self,
        work: Work,
        moments: Sequence[tuple[Moment, Format, str]],
        total: Callable[[Tensor], Tensor],
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        self._state = work.state
        self._dtype = dtype
        self._total = total
        self._rows, self._counted = work.rows, work.counted
        self._moments = {m.name: (m, fmt) for m, fmt, _ in moments}
        self._shard = {
            m.name: Shard(work.rows, noise.key(seed, work.index, j), work.step, total, work.counted)
            for j, (m, _, _) in enumerate(moments)
        }

    def _parts(self, name: str) -> tuple[Moment, Format, Shard, dict[str, Tensor]]:
        moment, fmt = self._moments[name]
        shard = self._shard[name]
        layout = fmt.layout(moment, shard.rows)
        return moment, fmt, shard, {part: self._state[f"{name}.{part}" if part else name] for part in layout}

    def read(self, name: str) -> Tensor:
        moment, fmt, shard, parts = self._parts(name)
        return fmt.read(parts, moment, shard).to(self._dtype)

    def write(self, name: str, value: Tensor, floor: float = 0.0) -> Tensor:
        moment, fmt, shard, parts = self._parts(name)
        return fmt.write(value.float(), parts, moment, shard, floor).to(self._dtype)

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

    def layout(self, spec: OptimSpec, h: Mapping[str, Any], name: str, rows: Rows) -> list[tuple[str, str, TensorSpec]]:
        return [
            (moment.name, part, tensor)
            for moment, fmt, _ in moment_formats(spec, h, name, rows)
            for part, tensor in fmt.layout(moment, rows).items()
        ]

    def shared_lines(self, spec: OptimSpec, lines: Sequence[Line]) -> list[Line]:
        return []

    def kept_in_32bit(self, spec: OptimSpec, h: Mapping[str, Any], name: str, rows: Rows) -> list[tuple[str, str]]:
        return [(moment.name, reason) for moment, _, reason in moment_formats(spec, h, name, rows) if reason]

    def step(self, spec: OptimSpec, works: Sequence[Work], partition: Partition, seed: int) -> None:
        from memopt import kernels

        ranks = partition.world_size
        shared = [bool(work.groups) and kernels.needs_ranks(spec, work, ranks) for work in works]
        for work in kernels.step(spec, [w for w, its in zip(works, shared, strict=True) if not its], 1, seed):
            plain_step(spec, work, lambda x: x, seed)
        if any(shared):
            from memopt.partitions.together import Total, Update, run_together

            def update(work: Work) -> Update:
                def run(total: Total) -> None:
                    if kernels.step(spec, [work], ranks, seed, total):
                        plain_step(spec, work, total, seed)

                numel = -(-Rows.whole(work.rows.shape).numel // ranks)
                return Update(run, work.groups, numel, work.p.device)

            run_together([update(work) for work, its in zip(works, shared, strict=True) if its])

    def slow_path(
        self, spec: OptimSpec, h: Mapping[str, Any], name: str, rows: Rows, p: Tensor, ranks: int, cut_row: bool
    ) -> str | None:
        from memopt import kernels

        return kernels.slow_path(spec, moment_formats(spec, h, name, rows), rows, p, ranks, cut_row)

    def explain(self) -> str:
        from memopt import kernels

        return kernels.status()


def plain_step(spec: OptimSpec, work: Work, total: Callable[[Tensor], Tensor], seed: int) -> None:
    """The definition of every rule × format × master. Parameters under 32 bits are updated in fp32 and rounded back.
    Rules that look at each element alone go through a large parameter in pieces."""
    moments = moment_formats(spec, work.h, work.name, work.rows)
    kept = master_of(spec, dtype_name(work.p)).key
    for piece in pieces(work, moments, RULES[spec.rule].element_wise, kept):
        _plain_piece(spec, piece, moments, total, seed)


def _plain_piece(
    spec: OptimSpec,
    work: Work,
    moments: Sequence[tuple[Moment, Format, str]],
    total: Callable[[Tensor], Tensor],
    seed: int,
) -> None:
    import torch

    p = work.p
    wide = p.dtype in (torch.float32, torch.float64)
    dtype = p.dtype if wide else torch.float32
    g = work.g.to(dtype)
    if work.h["maximize"]:
        g = g.neg()
    state = ParameterState(work, moments, total, seed, dtype)
    if wide:
        RULES[spec.rule].update(p, g, state, work.step, work.h)
        return
    master = master_of(spec, dtype_name(p))
    kept = work.state.get(master.key)
    exact = master.read(p, kept)
    RULES[spec.rule].update(exact, g, state, work.step, work.h)
    master.write(exact, p, kept, Shard(work.rows, noise.key(seed, work.index, ORDER), work.step, total))
