"""The parameters behind DeepSpeed's flat vectors, each with the rows of which this rank's vector has a part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import fsum, prod
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
from torch import Tensor

from memopt.core.hyperparameters import SpecError
from memopt.core.rows import Rows, Shape
from memopt.partitions.base import NUMEL_TOGETHER, NamedParam, Partition, sum_over
from memopt.partitions.deepspeed.spans import Span, cut_rows
from memopt.partitions.exchange import Share
from memopt.partitions.world import ProcessGroups

if TYPE_CHECKING:
    from memopt.spec import OptimSpec


class Origin(NamedTuple):
    """What is known of a parameter: it lies at ``at`` in the vector ``flat``, as far as this rank has it. ``spans`` are
    those of all ranks of ``process_group``, ``rank`` is this one's place there."""

    name: str
    shape: Shape
    group: dict[str, Any]  # the optimizer's
    flat: Tensor | None = None
    at: int = 0
    spans: tuple[Span, ...] = ()
    rank: int = 0
    process_group: Any = None


@final
class Fragment:
    """One parameter as far as it is here: ``part`` stands for it in the optimizer, in its own shape where all of it is
    here, else as a vector of its span."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        shape = origin.shape
        self.span = origin.spans[origin.rank] if origin.spans else Span(0, 0)
        self.rows = self.span.rows(shape)
        #: Whether other ranks have elements of it too, or have all of it between them.
        self.is_shared = sum(1 for span in origin.spans if span.numel) > 1
        #: Rows that are cut between ranks, and of these the ones that have elements here: place among them -> row.
        self.cut = cut_rows(shape, origin.spans)
        self.mine = {i: row for i, row in enumerate(self.cut) if self.rows.first <= row < self.rows.stop}
        self.part = torch.nn.Parameter(self._view(origin.flat), requires_grad=self.is_here)

    @property
    def is_here(self) -> bool:
        """Whether it is stepped here: this rank has elements of it, or takes part in its sums."""
        return self.is_shared or self.span.numel > 0

    def _view(self, flat: Tensor | None) -> Tensor:
        if flat is None:
            return torch.empty(0)
        found = flat.detach()[self.origin.at : self.origin.at + self.span.numel]
        return found.view(self.origin.shape) if self.span.numel == prod(self.origin.shape) else found

    def begin(self, present: set[int]) -> None:
        """Take the vector's memory and gradient as they are now, if it is stepped."""
        flat = self.origin.flat
        if flat is not None and self.is_here and id(flat) in present and flat.grad is not None:
            self.part.data = self._view(flat)
            self.part.grad = self._view(flat.grad)

    def edges(self) -> Iterator[tuple[int, slice, slice]]:
        """For each cut row of which a part is here: its place among the cut ones, and where that part is in the row
        and in the span."""
        cols = self.rows.cols
        for i, row in self.mine.items():
            start, stop = max(self.span.start, row * cols), min(self.span.stop, (row + 1) * cols)
            if start < stop:
                yield (
                    i,
                    slice(start - row * cols, stop - row * cols),
                    slice(start - self.span.start, stop - self.span.start),
                )

    def inside(self) -> slice:
        """Where the span is in its rows, flattened."""
        begin = self.span.start - self.rows.first * self.rows.cols
        return slice(begin, begin + self.span.numel)

    def whole_rows(self, part: Tensor, cut: Tensor | None) -> Tensor:
        """``part`` [span] with the rest of its cut rows, ``cut`` [cut rows, columns], as [rows.local_shape]."""
        if not self.mine:
            return part.view(self.rows.local_shape)
        assert cut is not None
        cols = self.rows.cols
        full = part.new_empty(self.rows.numel)
        for i, row in self.mine.items():
            into = full[(row - self.rows.first) * cols : (row - self.rows.first + 1) * cols]
            into.copy_(cut[i, : into.numel()])
        full[self.inside()] = part.view(-1)
        return full.view(self.rows.local_shape)


@final
class Fragments(Partition):
    """The rows of each parameter of which DeepSpeed gave this rank a part, for rules and formats that need shapes.

    A row that is cut is put together before the step, in one collective for a bucket of parameters, and stepped on
    every rank that has a part of it; each writes its own elements back. So state, blocks and random bits are those of
    whole rows, as everywhere. Not a value of a spec: the optimizer finds itself on it.
    """

    name = "fragments"
    summary = (
        "rows of the parameters behind DeepSpeed's flat vectors, found in its metadata when the optimizer first "
        "steps, loads or explains; rows that are cut between ranks are stepped on each of them"
    )
    is_flattened = True
    plannable = False

    def __init__(self, origins: Iterable[Origin]) -> None:
        super().__init__()
        self.fragments = [Fragment(origin) for origin in origins]
        self._of = {id(f.part): f for f in self.fragments}
        self._to_publish: list[tuple[Fragment, Tensor]] = []

    @staticmethod
    def rows(shape: Shape, rank: int, world_size: int) -> Rows:
        raise NotImplementedError("which rows a rank has is for DeepSpeed to say: memopt.price(deepspeed=…)")

    def entries(self, groups: Iterable[dict[str, Any]]) -> Iterator[NamedParam]:
        """All parameters, whatever the groups: DeepSpeed steps them one vector at a time."""
        for f in self.fragments:
            yield f.origin.name, f.part, f.origin.group

    def local_rows(self, p: Tensor) -> Rows:
        return self._of[id(p)].rows

    def cuts_a_row(self, p: Tensor) -> bool:
        return bool(self._of[id(p)].cut)

    def local(self, p: Tensor, rows: Rows, x: Tensor) -> Tensor:
        """As it is: :meth:`gather` makes rows of it."""
        return x

    def groups(self, p: Tensor) -> ProcessGroups:
        f = self._of[id(p)]
        return (f.origin.process_group,) if f.is_shared else ()

    def total_squares(self, parameters: Sequence[Tensor], squares: Sequence[float]) -> float:
        return self.total(torch.tensor([fsum(squares)], dtype=torch.float64)).item()

    def shares(self, p: Tensor) -> tuple[Share, ...]:
        origin, found = self._of[id(p)].origin, []
        for span in origin.spans:
            rows, counted = span.rows(origin.shape), span.counted(origin.shape)
            start = rows.bounds[0]
            found.append(Share((start + counted.start, start + counted.stop), rows.bounds))
        return tuple(found)

    def any_rank(self, bad: list[str], parameters: Sequence[Tensor]) -> list[str]:
        return self.anywhere(bad, "cpu")

    @contextmanager
    def step_context(self, groups: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        present = {id(p) for group in groups for p in group["params"]}
        self._to_publish.clear()
        try:
            for f in self.fragments:
                f.begin(present)
            yield
        finally:
            for f in self.fragments:
                f.part.grad = None  # it is DeepSpeed's to free

    @contextmanager
    def logical_params(self, optimizer: Any) -> Iterator[None]:
        groups, state = optimizer.param_groups, optimizer.state
        mine = list({id(f.origin.group): f.origin.group for f in self.fragments}.values())
        before = [group["params"] for group in mine]
        for key in [key for key, parts in state.items() if not parts]:
            del state[key]  # DeepSpeed looks for state of its vectors, and so makes entries
        try:
            for group in mine:
                group["params"] = [f.part for f in self.fragments if f.origin.group is group]
            optimizer.param_groups = mine
            yield
        finally:
            optimizer.param_groups = groups
            for group, params in zip(mine, before, strict=True):
                group["params"] = params

    def cut(self) -> dict[str, list[int]]:
        return {f.origin.name: [f.span.start, f.span.stop] for f in self.fragments}

    def refuse_conversion(self, spec: OptimSpec, needs_shapes: str | None) -> None:
        raise SpecError(
            f"convert_ cannot go to '{spec}' while DeepSpeed has the parameters: make the optimizer with it"
        )

    def buckets(self, parameters: Sequence[Tensor], whole: Sequence[bool] = ()) -> list[tuple[int, int]]:
        """Ends are where a shared parameter would be too many, for the others are not on all ranks."""
        ends, total = [], 0
        for i, f in enumerate(self._of[id(p)] for p in parameters):
            if f.is_shared:
                numel = max(span.numel for span in f.origin.spans)
                if total and total + numel > NUMEL_TOGETHER:
                    ends.append(i)
                    total = 0
                total += numel
        return list(zip([0, *ends], [*ends, len(parameters)], strict=True))

    def gather(self, works: Sequence[Any]) -> Sequence[Any]:
        """Shared parameters first: ranks step them in the same order, and the others as they have them."""
        pairs = [(self.fragments[work.index], work) for work in works]
        shared = [(f, work) for f, work in pairs if f.is_shared]
        alike: dict[Any, list[tuple[Fragment, Any]]] = {}
        for f, work in shared:
            if f.cut:
                alike.setdefault((f.origin.process_group, work.p.dtype, work.p.device), []).append((f, work))
        cut: dict[int, Tensor] = {}  # of p and g [2, cut rows, columns]
        for (process_group, _, _), some in alike.items():
            for (_, work), rows in zip(some, _sum_of_parts(some, process_group), strict=True):
                cut[work.index] = rows
        return [
            *(self._with_rows(f, work, cut.get(work.index)) for f, work in shared),
            *(work for f, work in pairs if not f.is_shared),
        ]

    def _with_rows(self, f: Fragment, work: Any, cut: Tensor | None) -> Any:
        p, g = (f.whole_rows(x, None if cut is None else cut[i]) for i, x in enumerate((work.p, work.g)))
        if f.mine:
            self._to_publish.append((f, p))
        return work._replace(p=p, g=g, counted=f.span.counted(f.origin.shape) if f.cut else ...)

    def all_gather_begin(self, parameters: Sequence[Tensor]) -> None:
        for f, p in self._to_publish:
            f.part.data.view(-1).copy_(p.view(-1)[f.inside()])
        self._to_publish.clear()


def _sum_of_parts(some: Sequence[tuple[Fragment, Any]], process_group: Any) -> list[Tensor]:
    """For each, the whole cut rows of p and g [2, cut rows, columns], in one collective."""
    sizes = [(2, len(f.cut), f.rows.cols) for f, _ in some]
    buffer = some[0][1].p.new_zeros(sum(map(prod, sizes)))
    rows = [x.view(size) for x, size in zip(buffer.split([prod(size) for size in sizes]), sizes, strict=True)]
    for (f, work), into in zip(some, rows, strict=True):
        for i, at, part in f.edges():
            into[0, i, at], into[1, i, at] = work.p.view(-1)[part], work.g.reshape(-1)[part]
    total = sum_over(buffer, (process_group,))
    return [x.view(size) for x, size in zip(total.split([prod(size) for size in sizes]), sizes, strict=True)]
