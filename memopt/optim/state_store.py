"""The state of an optimizer: allocated from the ledger's lines, held against the layouts, committed, counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, final
from weakref import ref

import torch
from torch import Tensor

from memopt.core.ledger import Ledger, Line, dtype_name
from memopt.core.rows import Rows
from memopt.layout import param
from memopt.layout.replaced_state import (
    Here,
    here_names,
    is_own,
    is_plain,
    lost_master,
    of_another_rule,
    stands,
    taken_over,
)
from memopt.optim.column_shards import check_slab
from memopt.optim.edits.param_groups import has_shape
from memopt.optim.params import Params, Resolved
from memopt.partitions.dtensor import as_sharded
from memopt.placements.base import PlacementStore
from memopt.placements.stores.by_placement import chunked

if TYPE_CHECKING:
    from memopt.layout.param import ParamLayout


@final
class StateStore:
    """What stands in ``optimizer.state``, and where the placements keep it."""

    def __init__(self, params: Params) -> None:
        self.params, self.setup = params, params.setup
        self._unshaped: list[Tensor] = []  # of lazy modules, when parameters were shown to the placements
        self._shapes: dict[str, tuple[ref[Tensor], torch.Size]] = {}

    @property
    def state(self) -> Any:
        """The optimizer's dictionary: parameter -> its state, and whatever the user has put there."""
        return self.params.owner.state

    def notice_replaced(self) -> None:
        """Follow parameters that somebody has replaced."""
        if self.params.follow():
            self.register_params()

    # Checked against the layouts -------------------------------------------------------------------------------

    def check(self, one: Resolved, local: Tensor) -> None:
        """Hold the state of a parameter, of which ``local`` are the rows here, against its layout and its placement.
        What somebody else has put there is taken over where that can be done; RuntimeError with the reason where not.
        """
        layout, p, group = one
        state = self.state.get(p)
        if not state:
            return
        placement_store = self.setup.placement_stores.of(layout.name)
        problem = layout.misfit(local, state)
        foreign = of_another_rule(layout.rule.name, self.setup.spec.rule_names, state)
        fits = problem is None and not is_plain(layout, state) and not lost_master(layout, state) and not foreign
        if fits and placement_store.knows_states:
            fits = placement_store.holds(layout.name, {key: state[key] for key in layout.tensors})
        if fits:
            self._check_shape(layout.name, p, state)
            return
        partition = self.setup.partition

        def rows_of(x: Tensor) -> Tensor:
            return partition.local(p, layout.rows, as_sharded(x, p))

        here = Here(local, layout.rows.local_shape, group, p.shape, rows_of, partition.total_of(p))
        values = taken_over(layout, here, state)
        if values is None:
            raise RuntimeError(problem or f"{layout.name}: its state has a moment of torch.optim's that does not fit")
        if self.setup.spec.is_mixed and here_names(layout).isdisjoint(key.partition(".")[0] for key in state):
            values["step"] = 0.0  # moved from another rule's group: its moments begin, and what corrects their bias
        self._put(layout, p, state, values, foreign)

    def _check_shape(self, name: str, p: Tensor, state: Mapping[str, Any]) -> None:
        """Raise RuntimeError for state of a weight of another shape that takes as many bytes: two 4-bit codes are in
        one. Remember the shape that this state is of."""
        before = self._shapes.get(name)
        first: Tensor | None = None
        for key, x in state.items():
            if key != "step" and isinstance(x, Tensor):
                first = x
                break
        if first is None:
            return
        if before is not None and before[0]() is first:
            if before[1] == p.shape:
                return
            raise RuntimeError(
                f"{name} is {tuple(p.shape)} here, and its state is of {tuple(before[1])}; nothing was stepped. "
                "opt.append_rows and opt.select_rows take state along, opt.state.pop(parameter) begins it anew"
            )
        self._shapes[name] = ref(first), p.shape

    def _put(
        self, layout: ParamLayout, p: Tensor, state: dict[str, Any], values: dict[str, Any], foreign: set[str]
    ) -> None:
        """``values`` are the state now, where the placement says, with what else stands there."""
        beside = stands(layout, state, values, foreign)
        step, *lines = layout.lines(str(p.device), self.setup.capturable)
        count = torch.full((), values.pop("step"), dtype=torch.float32, device=step.location)
        placement_store = self.setup.placement_stores.of(layout.name)
        if type(placement_store) is PlacementStore:  # tensors that fit are the state, as in torch.optim
            dtypes = {line.key: getattr(torch, line.dtype) for line in lines}
            made = {key: x.detach().to(p.device, dtypes[key]).contiguous() for key, x in values.items()}
        else:
            # They may lie where there will be room.
            values = {key: x.clone() for key, x in values.items()}
            beside = {key: x.clone() if isinstance(x, Tensor) else x for key, x in beside.items()}
            made = placement_store.allocate(layout.name, lines, p.device)
            for key, x in values.items():
                made[key].copy_(x)
        state.clear()
        state.update({"step": count, **made, **beside})
        self.prepare([p])

    def check_all(self) -> None:
        """Before anybody takes the state for that of the parameters: hold all of it against the layouts."""
        for one in self.params.resolved():
            if self.state.get(one.p):
                self.check(one, self.setup.partition.local(one.p, one.layout.rows, one.p))

    @contextmanager
    def restoring(self, what: str) -> Iterator[None]:
        """Around what writes the state of every parameter, whatever has become of the state that is there."""
        setup = self.setup
        whole = setup.integrity.torn is None and setup.unfinished is None
        with setup.integrity.changing(what, restores=True):
            if not whole:
                setup.placement_stores.abandon()
                setup.partition.abandon()
                if setup.unfinished is not None:
                    setup.unfinished.placement_stores.replaced_by(setup.placement_stores)
                    setup.unfinished = None
                self.state.clear()
            yield

    # Allocation ------------------------------------------------------------------------------------------------

    def init(self, anew: bool) -> None:
        """See :meth:`memopt.Optimizer.init_state`."""
        if not anew:
            self.setup.check_whole()
        self.notice_replaced()
        self.setup.partition.validate_params([(name, p) for name, p, _ in self.params.entries()], str(self.setup.spec))
        wanted = [one for one in self.params.resolved() if one.p.requires_grad]
        if not anew:
            self.allocate_missing(wanted)
            self.flush()
            return
        with self.restoring("init_state(anew=True)"):
            self.state.clear()
            for one in wanted:
                self.allocate(one, fresh=True)
            self.flush()

    def allocate_missing(self, wanted: Sequence[Resolved]) -> None:
        """State for those that have none; all of it or, where there is no room, none."""
        if self._unshaped and all(has_shape(p) for p in self._unshaped):
            self.register_params()
        fresh: list[Tensor] = []
        missing = [one for one in wanted if not self.state.get(one.p)]
        try:
            self._preallocate(missing)
            for one in missing:
                if not self.state.get(one.p):
                    fresh.append(one.p)
                    self.allocate(one)
            self.prepare(fresh)
        except BaseException:
            for p in fresh:
                self.state.pop(p, None)
            raise
        finally:
            if missing:
                self._preallocate(())

    def _preallocate(self, wanted: Sequence[Resolved]) -> None:
        stores, capturable = self.setup.placement_stores, self.setup.capturable
        for store in stores:
            mine = [one for one in wanted if stores.of(one.layout.name) is store] if store.preallocates else []
            store.preallocate([(one.layout.name, one.layout.lines(str(one.p.device), capturable)[1:]) for one in mine])

    def allocate(self, one: Resolved, *, fresh: bool = False) -> dict[str, Tensor]:
        """State from the ledger's lines: what an earlier process left unless ``fresh``, else zeros."""
        layout, p, group = one
        spec = self.setup.spec

        def whole() -> ParamLayout:
            return param.resolve_layout(spec, group, layout.name, 0, Rows.whole(tuple(p.shape)), layout.dtype)

        check_slab(layout, p, whole, len(self.setup.partition.groups(p)))
        step, *lines = layout.lines(str(p.device), self.setup.capturable)
        name, placement_store = layout.name, self.setup.placement_stores.of(layout.name)
        tensors, count = (None if fresh else placement_store.restore(name, lines)) or (
            placement_store.allocate(name, lines, p.device),
            0.0,
        )
        state = {step.key: torch.full((), count, dtype=torch.float32, device=step.location), **tensors}
        self.state[p] = state
        self.setup.integrity.snapshot = ()
        self._check_shape(name, p, state)
        return state

    def lines(self, name: str, p: Tensor, h: Mapping[str, Any]) -> list[Line]:
        """The lines of the ledger of a parameter with the hyperparameters ``h``, that of the step first."""
        return self.params.resolve(name, p, h).lines(str(p.device), self.setup.capturable)

    # What placements are told ----------------------------------------------------------------------------------

    def flush(self) -> None:
        """Call after state changed outside ``step()``: allocates stream buffers and flushes persistent state."""
        if self.setup.placement_stores.elsewhere:
            self.prepare()
            self.commit()

    def prepare(self, fresh: Iterable[Tensor] | None = None) -> None:
        """Allocate what stepping parameters that have state needs; with ``fresh``, for these besides the others."""
        if self.setup.placement_stores.elsewhere and fresh != []:
            wanted = None if fresh is None else {id(p) for p in fresh}
            stepping = {
                layout.name: (chunked(layout), p.device)
                for layout, p, _ in self.params.resolved()
                if self.state.get(p) and (wanted is None or id(p) in wanted)
            }
            self.setup.placement_stores.prepare(stepping, also=fresh is not None)

    def register_params(self) -> None:
        """Tell the placements of parameters and groups as they are now, and whose gradients may go elsewhere."""
        release, placement_stores = self.setup.release, self.setup.placement_stores
        if release is not None:
            release.follow()
        if placement_stores.takes_params:
            released = release.covers if release is not None else lambda p: False
            self._unshaped = [p for _, p, _ in self.params.entries() if not has_shape(p)]
            placement_stores.register_params(
                (layout.name, p, chunked(layout), not released(p)) for layout, p, _ in self.params.resolved()
            )

    def commit(self) -> None:
        """What outlives the process is the state of now."""
        if not self.setup.placement_stores.elsewhere:
            return
        states = {name: self.state[p] for name, p, _ in self.params.entries() if self.state.get(p)}
        failed: OSError | None = None
        with self.setup.integrity.changing("the commit of a step"):
            try:
                self.setup.placement_stores.commit(states)
            except OSError as error:  # in this process the state is whole, and the next commit may succeed
                failed = error
        if failed is not None:
            raise failed

    def ledger(self) -> Ledger:
        """See :meth:`memopt.Optimizer.ledger`."""
        lines, setup = [], self.setup
        for name, p, group in self.params.entries():
            rule, placement = setup.spec.rule_of(group), setup.placement_stores.of(name).placement
            for key, tensor in self.state.get(p, {}).items():
                if not isinstance(tensor, Tensor):  # a number of the user's own
                    continue
                moment, _, part = key.partition(".")
                own = key == "step" or is_own(rule, key)
                where = str(tensor.device) if own else placement.location(str(p.device))
                nbytes = tensor.numel() * tensor.element_size()
                lines.append(Line(name, moment, part, dtype_name(tensor), tuple(tensor.shape), nbytes, where))
        return Ledger([*lines, *setup.engine.shared_lines(lines), *setup.placement_stores.workspace()])
