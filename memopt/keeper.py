"""What an optimizer keeps: parameters and groups, their state and where it is, saving and loading."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from memopt.engines import Engine
from memopt.geometry import Rows
from memopt.groups import STEPPED, align_names, check_group
from memopt.integrity import Integrity
from memopt.layout import param
from memopt.ledger import Ledger, Line, dtype_name
from memopt.live_groups import LiveGroups, has_shape
from memopt.optim.layouts import Entry, Layouts
from memopt.partitions import Partition
from memopt.partitions.flat import check_replaced, replaced_by_vectors
from memopt.partitions.recovering import Made
from memopt.partitions.slab import check_slab
from memopt.placements.base import Home
from memopt.placements.homes import Homes, held
from memopt.rules import Rule
from memopt.spec import OptimSpec
from memopt.state import LoadPlan, packed, packed_bytes, plan_load, unpacked_bytes
from memopt.takeover import Here, is_own, is_plain, own_entries, stands, taken_over

if TYPE_CHECKING:
    from memopt.checkpoint.changing import Work
    from memopt.layout.param import ParamLayout
    from memopt.release import Release


class Keeper(torch.optim.Optimizer):
    """State as ``spec`` says, made, priced, saved and loaded; :class:`memopt.Optimizer` adds the step."""

    spec: OptimSpec
    integrity: Integrity
    rule: Rule
    engine: Engine
    partition: Partition
    homes: Homes
    process_group: Any
    nonfinite: str
    seed: int
    capturable: bool
    skipped_steps: int
    release: Release | None
    _live: LiveGroups
    _made_for: list[Made]
    _seen_ids: list[int]
    _unshaped: list[Tensor]
    #: A conversion that was stopped where the parameters done and the others are of two rules.
    unfinished: Work | None = None
    _layouts: Layouts

    def _check_finished(self) -> None:
        """Raise RuntimeError where a change of the state was interrupted, so that nobody takes it for whole."""
        self.integrity.check()
        if self.unfinished is not None:
            raise RuntimeError(str(self.unfinished))

    @contextmanager
    def _restoring(self, what: str) -> Iterator[None]:
        """Around what writes the state of every parameter, whatever has become of the state that is there."""
        whole = self.integrity.torn is None and self.unfinished is None
        with self.integrity.changing(what, restores=True):
            if not whole:
                self.homes.abandon()
                self.partition.abandon()
                if self.unfinished is not None:
                    self.unfinished.homes.replaced_by(self.homes)
                    self.unfinished = None
                self.state.clear()
            yield

    @abstractmethod
    def settle(self) -> None:
        """Take note of what became of the last step, where kernels run beside the host."""

    @abstractmethod
    def _configure(self, process_group: Any = None) -> None:
        """Find what the spec names."""

    # Parameters and groups -------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's; a hyperparameter that the rule does not have, or a value that is not allowed,
        and a parameter that is already there raise an error and leave the optimizer as it was."""
        self._check_finished()
        if self.partition.is_flattened:
            raise RuntimeError("DeepSpeed has taken the parameters of this optimizer; no group can be added")
        group = check_group(param_group, self.spec, {id(p) for g in self.param_groups for p in g["params"]})
        align_names(group, self.param_groups)
        super().add_param_group(group)
        self._remember(edited=True)
        self._watch()

    def _parameters(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """``(name, parameter, group)`` in order; without names, the parameter's number."""
        if self.partition.is_flattened or replaced_by_vectors(self):
            yield from self.partition.entries(self.param_groups)
            return
        found = self._live.names(self.param_groups, self.spec, self.state)
        for group, names in zip(self.param_groups, found, strict=True):
            for name, p in zip(names, group["params"], strict=True):
                yield name, p, group

    def _remember(self, edited: bool = False) -> None:
        """What the optimizer has as parameters, for another tool may replace it. Where groups were ``edited``, the
        shapes of parameters that were there stay those of their state."""
        before = {id(one.parameter()): one.shape for one in self._made_for} if edited else {}
        entries = list(self._parameters())
        self._made_for = [
            Made(name, ref(p), before.get(id(p)) or (tuple(p.shape) if has_shape(p) else ()), group)
            for name, p, group in entries
        ]
        self._seen_ids = [id(p) for _, p, _ in entries]

    def _rows(self, p: Tensor) -> Rows:
        return self.partition.held(p)

    def _layouts_of(self, entries: Iterable[Entry]) -> list[ParamLayout]:
        return self._layouts.of(entries, self.spec, self.partition, self.seed)

    def _all_layouts(self) -> list[tuple[str, Tensor, dict[str, Any], ParamLayout]]:
        """Every parameter that may be stepped, with its layout: ``(name, parameter, group, layout)``."""
        numbered = enumerate(self._parameters())
        entries = [(i, *entry) for i, entry in numbered if has_shape(entry[1]) and entry[1].dtype in STEPPED]
        return [(*entry[1:], layout) for entry, layout in zip(entries, self._layouts_of(entries), strict=True)]

    def _check_state(self, layout: ParamLayout, p: Tensor, local: Tensor, group: Mapping[str, Any]) -> None:
        """Hold the state of ``p``, of which ``local`` are the rows here, against its layout and its placement. What
        somebody else has put there is taken over where that can be done; RuntimeError with the reason where not."""
        state = self.state.get(p)
        if not state:
            return
        home = self.homes.of(layout.name)
        problem = layout.misfit(local, state)
        fits = problem is None and not is_plain(layout, state)
        if fits and home.holds(layout.name, {key: state[key] for key in layout.tensors}):
            return
        partition = self.partition

        def rows_of(x: Tensor) -> Tensor:
            return partition.local(p, layout.rows, x)

        here = Here(local, layout.rows.local_shape, group, p.shape, rows_of, partition.total_of(p))
        values = taken_over(layout, here, state)
        if values is None:
            raise RuntimeError(problem or f"{layout.name}: its state has a moment of torch.optim's that does not fit")
        self._put_state(layout, p, state, values)

    def _put_state(self, layout: ParamLayout, p: Tensor, state: dict[str, Any], values: dict[str, Any]) -> None:
        """``values`` are the state now, where the placement says, with what else stands there."""
        beside = stands(layout, state, values)
        step, *lines = layout.lines(str(p.device), self.capturable)
        count = torch.full((), values.pop("step"), dtype=torch.float32, device=step.location)
        home = self.homes.of(layout.name)
        if type(home) is Home:  # tensors that fit are the state, as in torch.optim
            dtypes = {line.key: getattr(torch, line.dtype) for line in lines}
            made = {key: x.detach().to(p.device, dtypes[key]).contiguous() for key, x in values.items()}
        else:
            # They may lie where there will be room.
            values = {key: x.clone() for key, x in values.items()}
            beside = {key: x.clone() if isinstance(x, Tensor) else x for key, x in beside.items()}
            made = home.allocate(layout.name, lines, p.device)
            for key, x in values.items():
                made[key].copy_(x)
        state.clear()
        state.update({"step": count, **made, **beside})
        self._prepare([p])

    def _check_states(self) -> None:
        """Before anybody takes the state for that of the parameters: hold all of it against the layouts."""
        for _, p, group, layout in self._all_layouts():
            if self.state.get(p):
                self._check_state(layout, p, self.partition.local(p, layout.rows, p), group)

    # State -----------------------------------------------------------------------------------------------------

    def init_state(self, *, anew: bool = False) -> None:
        """Allocate the state of every parameter that requires a gradient and has none; zeros, as before the first step.
        Those of lazy modules that have no shape yet get theirs at their first step.

        Args:
            anew: forget the state that is there, too, and begin again: moments are zero and no step has been taken.
                Ends the refusals that follow a step, a load or a conversion which stopped in the middle.
        """
        if not anew:
            self._check_finished()
        check_replaced(self)
        self.partition.admit([(name, p) for name, p, _ in self._parameters()], str(self.spec))
        wanted = [(layout, p, group) for _, p, group, layout in self._all_layouts() if p.requires_grad]
        if not anew:
            self._allocate_missing(wanted)
            self._take_place()
            return
        with self._restoring("init_state(anew=True)"):
            self.state.clear()
            for entry in wanted:
                self._allocate(*entry, fresh=True)
            self._take_place()

    def _allocate_missing(self, parameters: Iterable[tuple[ParamLayout, Tensor, Mapping[str, Any]]]) -> None:
        """State for those that have none; all of it or, where there is no room, none."""
        if self._unshaped and all(has_shape(p) for p in self._unshaped):
            self._watch()
        fresh: list[Tensor] = []
        try:
            for layout, p, group in parameters:
                if not self.state.get(p):
                    fresh.append(p)
                    self._allocate(layout, p, group)
            self._prepare(fresh)
        except BaseException:
            for p in fresh:
                self.state.pop(p, None)
            raise

    def _take_place(self) -> None:
        """State was made or replaced other than by a step: allocate what stepping it needs, and make it survive."""
        if not self.homes.elsewhere:
            return
        self._prepare()
        self._commit()

    def _prepare(self, fresh: Iterable[Tensor] | None = None) -> None:
        """Allocate what stepping parameters that have state needs; with ``fresh``, for these besides the others."""
        if self.homes.elsewhere and fresh != []:
            known = None if fresh is None else {id(p) for p in fresh}
            stepping = {
                name: (held(layout), p.device)
                for name, p, _, layout in self._all_layouts()
                if self.state.get(p) and (known is None or id(p) in known)
            }
            self.homes.prepare(stepping, also=fresh is not None)

    def _watch(self) -> None:
        """Tell the homes of parameters and groups as they are now, and whose gradients may go elsewhere."""
        if self.release is not None:
            self.release.follow()
        if self.homes.watches:
            released = self.release.covers if self.release is not None else lambda p: False
            self._unshaped = [p for _, p, _ in self._parameters() if not has_shape(p)]
            self.homes.watch((name, p, held(layout), not released(p)) for name, p, _, layout in self._all_layouts())

    def _commit(self) -> None:
        if not self.homes.elsewhere:
            return
        states = {name: self.state[p] for name, p, _ in self._parameters() if self.state.get(p)}
        failed: OSError | None = None
        with self.integrity.changing("the commit of a step"):
            try:
                self.homes.commit(states)
            except OSError as error:  # in this process the state is whole, and the next commit may succeed
                failed = error
        if failed is not None:
            raise failed

    def close(self) -> None:
        """Give back what others may want: the directory of ``@disk``, threads, the folders of checkpoints that this
        process has locked for it. State can still be read."""
        from memopt.checkpoint import lock

        self.homes.close()
        lock.release(id(self))

    def _resolved(self, name: str, p: Tensor, h: Mapping[str, Any]) -> ParamLayout:
        """The layout that a parameter would have with the hyperparameters ``h``."""
        return param.resolve(self.spec, h, name, 0, self._rows(p), dtype_name(p), self.seed)

    def _lines(self, name: str, p: Tensor, group: Mapping[str, Any]) -> list[Line]:
        return self._resolved(name, p, group).lines(str(p.device), self.capturable)

    def _allocate(
        self, layout: ParamLayout, p: Tensor, group: Mapping[str, Any], *, fresh: bool = False
    ) -> dict[str, Tensor]:
        """State from the ledger's lines: what an earlier process left unless ``fresh``, else zeros."""

        def whole() -> ParamLayout:
            return param.resolve(self.spec, group, layout.name, 0, Rows.whole(tuple(p.shape)), layout.dtype)

        check_slab(layout, p, whole)
        step, *lines = layout.lines(str(p.device), self.capturable)
        name, home = layout.name, self.homes.of(layout.name)
        tensors, count = (None if fresh else home.survivor(name, lines)) or (home.allocate(name, lines, p.device), 0.0)
        state = {step.key: torch.full((), count, dtype=torch.float32, device=step.location), **tensors}
        self.state[p] = state
        return state

    def _to_overwrite(self, name: str, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """State that may be written over, none of its values being wanted any more."""
        layout = self._resolved(name, p, group)
        there: dict[str, Tensor] | None = self.state.get(p) if self.homes.of(name).rewritable else None
        if there and layout.misfit(self.partition.local(p, layout.rows, p), there) is None:
            return there
        return self._allocate(layout, p, group, fresh=True)

    def ledger(self) -> Ledger:
        """What the state costs now, read from the live tensors; parameters that have not stepped have none. Tensors
        that the user has put beside the state are in it."""
        lines = []
        for name, p, _ in self._parameters():
            placement = self.homes.of(name).placement
            for key, tensor in self.state.get(p, {}).items():
                if not isinstance(tensor, Tensor):  # a number of the user's own
                    continue
                moment, _, part = key.partition(".")
                own = key == "step" or is_own(self.spec.rule, key)
                where = str(tensor.device) if own else placement.location(str(p.device))
                nbytes = tensor.numel() * tensor.element_size()
                lines.append(Line(name, moment, part, dtype_name(tensor), tuple(tensor.shape), nbytes, where))
        return Ledger([*lines, *self.engine.shared_lines(lines), *self.homes.workspace()])

    # Saving and loading ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch.optim's dictionary (plain tensors, this rank's rows; of sharded parameters DTensors, as
        torch.distributed.checkpoint takes them), and under ``"memopt"`` what is needed to tell whether it fits: spec,
        rank, world size and the seed of the stochastic rounding. Hooks see all of it, and what they return is what is
        returned; state under a key that is no parameter goes along."""
        from memopt.partitions import as_dtensors

        as_dtensors.refuse_helpers(self)
        self._check_finished()
        self.settle()
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        with self.partition.shown(self):
            self._check_states()
            state, groups = packed(self)
            state = as_dtensors.wrapped(self, state)
        cut = self.partition.cut()
        found: dict[str, Any] = {
            "state": state,
            "param_groups": groups,
            "memopt": {
                "spec": str(self.spec),
                "rank": self.partition.rank,
                "world_size": self.partition.world_size,
                "seed": self.seed,
                "skipped_steps": self.skipped_steps,
                **({} if cut is None else {"cut": cut}),
            },
        }
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, found)
            found = found if replaced is None else replaced
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, or a torch.optim dictionary whose state has the same keys.

        Everything is checked before anything is changed. dtypes stay as saved and state goes where the placement
        says (torch.optim's own method casts it to the parameter's dtype and device). Raises ValueError with the
        parameter and the key that do not fit.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        check_replaced(self)
        with self.partition.shown(self):
            plan = plan_load(self, state_dict)
            self._refuse_own(plan)
            with self._restoring("load_state_dict()"):
                self._load(plan)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _refuse_own(self, plan: LoadPlan) -> None:
        """Raise ValueError for a dictionary whose tensors are the state itself where that was interrupted."""
        if self.integrity.torn is None:
            return
        states = [state for state in self.state.values() if isinstance(state, dict)]
        own = {t.data_ptr() for state in states for t in state.values() if isinstance(t, Tensor) and t.numel()}
        for (name, _, _), saved in plan.states:
            if any(isinstance(t, Tensor) and t.numel() and t.data_ptr() in own for t in saved.values()):
                raise ValueError(
                    f"{name}: the state_dict holds the optimizer's own tensors, as state_dict() returns them, and they "
                    f"are what {self.integrity.torn.split(':')[0]} left; load a copy or a checkpoint"
                )

    def _load(self, plan: LoadPlan) -> None:
        for (name, p, group), saved in plan.states:
            h = self.rule.keeping({**group, **plan.hyper_of(group)}, saved)
            target = self._to_overwrite(name, p, h)
            for key in [key for key in target if is_own(self.spec.rule, key)]:
                del target[key]
            for key, tensor in target.items():
                tensor.copy_(torch.as_tensor(saved[key])) if key in saved else tensor.zero_()
            target.update(copy.deepcopy(own_entries(self.spec.rule, saved)))
        for p in plan.without_state:
            self.state.pop(p, None)
        for other in [key for key in self.state if not isinstance(key, Tensor)]:
            del self.state[other]
        self.state.update(plan.others)
        for group, loaded in zip(self.param_groups, plan.groups, strict=True):
            group.update(loaded)
        self.seed = plan.metadata.get("seed", self.seed)
        self.skipped_steps = plan.metadata.get("skipped_steps", self.skipped_steps)
        self._take_place()

    def __getstate__(self) -> dict[str, Any]:
        self._check_finished()
        if self.process_group is not None:
            raise TypeError("an optimizer with its own process_group cannot be pickled or copied; use state_dict()")
        if self.partition.is_flattened:
            raise TypeError(
                "an optimizer of DeepSpeed's vectors cannot be pickled or copied; use the engine's save_checkpoint"
            )
        if not self.homes.copyable:
            raise TypeError(
                "an optimizer with a directory cannot be pickled or copied, two would write there; use state_dict()"
            )
        self.settle()
        self._check_states()
        ours = {name: getattr(self, name) for name in ("spec", "nonfinite", "seed", "capturable")}
        ours["_skipped"] = self.skipped_steps
        state = {p: packed_bytes(x) if isinstance(x, dict) else x for p, x in self.state.items()}
        return {**super().__getstate__(), "state": state, "memopt": ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        for name, value in state.pop("memopt", {}).items():
            setattr(self, name, value)
        super().__setstate__(state)
        self._configure()
        self._remember()
        # A copy of a tensor is ordinary memory: put it back where the placement says.
        copied = {p: unpacked_bytes(x) if isinstance(x, dict) else x for p, x in self.state.items()}
        self.state = defaultdict(dict)
        for _, p, group, layout in self._all_layouts():
            parts = copied.pop(p, None)
            if parts:
                target = self._allocate(layout, p, group, fresh=True)
                for key, value in parts.items():
                    if key in target:
                        target[key].copy_(value)
                    else:
                        target[key] = value
        self.state.update(copied)
        self._watch()
        self._take_place()
