"""The step: gradients checked, state fetched, stepped and written back, steps counted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, final

from torch import Tensor
from torch.autograd.graph import increment_version  # kernels write where autograd does not look

from memopt import kernels
from memopt.layout.param_step import Work, count_steps
from memopt.optim import grad_scaler
from memopt.optim.params import Resolved
from memopt.optim.state_store import StateStore
from memopt.placements.gradients.checks import check_gradient, non_finite

if TYPE_CHECKING:
    from memopt.layout.param import ParamLayout

#: Place among all parameters, name, parameter, group.
Entry = tuple[int, str, Tensor, dict[str, Any]]


class Ready(NamedTuple):
    """A parameter that has a gradient, and what is stepped here of the two: of their layout."""

    layout: ParamLayout
    p: Tensor
    group: dict[str, Any]
    local: Tensor
    gradient: Tensor


class Scaler(NamedTuple):
    """What torch.amp.GradScaler has put on the optimizer for this step."""

    found_inf: Tensor | None
    grad_scale: Tensor | None


@final
class Stepper:
    """``plan`` is the cached step: what was prepared for the tensors of the last one."""

    def __init__(self, store: StateStore) -> None:
        self.store, self.params, self.setup = store, store.params, store.setup
        self.plan: kernels.Plan | None = None
        self._captured: list[kernels.Plan] = []  # plans whose tables a CUDA graph reads
        #: Steps that did not happen, as far as the host has counted them.
        self.skipped = 0

    def step(self, scaler: Scaler) -> None:
        """One step of every parameter that has a gradient."""
        setup, groups = self.setup, self.params.owner.param_groups
        self.params.live.check_values(groups, setup.spec)
        if setup.integrity.marks or setup.unfinished is not None:
            setup.check_whole()
        if setup.release is None and self._run_cached(scaler):  # the tensors of the last step, with new gradients
            return
        self.store.notice_replaced()
        with setup.partition.at_step(groups):
            with self._released():
                gradients, ready = self._collect_gradients()
                if not self._is_skipped(scaler, gradients, ready):
                    works = self.step_some(ready)
                    self._cache(works, scaler)
            self.store.commit()

    # The cached step -------------------------------------------------------------------------------------------

    def _context(self, scaler: Scaler) -> kernels.StepContext:
        setup, owner = self.setup, self.params.owner
        return kernels.StepContext(
            setup.spec,
            setup.partition,
            owner.param_groups,
            owner.state,
            setup.seed,
            setup.nonfinite,
            setup.capturable,
            setup.integrity,
            scaler.found_inf,
            scaler.grad_scale,
        )

    def _run_cached(self, scaler: Scaler) -> bool:
        """Repeat the last step where it was prepared for what is there now."""
        plan = self.plan
        if plan is None:
            return False
        plan.check_recording()
        self.settle()
        if not plan.refresh(self._context(scaler)):
            return False
        if plan.recorded and plan not in self._captured:
            self._captured.append(plan)
        if self.setup.nonfinite == "propagate" or not self.stopped_by(plan.non_finite()):
            plan.step()
            increment_version(plan.parameters)
        return True

    def _cache(self, works: Sequence[Work], scaler: Scaler) -> None:
        # A step without any gradient leaves the plan, which counts, to the next one; what a release leaves over is
        # another every time.
        if works and self.setup.release is None:
            where = self.setup.homes.in_place
            originals = {i: p for i, _, p, _ in self.params.numbered()}
            plannable = self.setup.partition.plannable
            context = self._context(scaler)
            self.plan = kernels.make_plan(context, works, originals, where, self.plan) if plannable else None

    def settle(self) -> None:
        """Take note of what became of the last step, where kernels run beside the host."""
        outcome = self.plan.settle() if self.plan is not None else None
        if outcome is not None:
            if outcome.names:
                self.stopped_by(outcome.names)
            else:
                self.skipped += outcome.skipped

    # The step without a cache ----------------------------------------------------------------------------------

    @contextmanager
    def _released(self) -> Iterator[None]:
        """Around a step that ends what gradient release has begun in ``backward()``."""
        release, before = self.setup.release, self.skipped
        try:
            yield
        except BaseException:
            if release is not None:
                release.give_up()
            raise
        if release is not None:
            release.finish(counted=self.skipped > before)

    def _collect_gradients(self) -> tuple[list[tuple[str, Tensor]], list[Ready]]:
        """What has a gradient, checked: the gradients as they are here, and what is stepped here."""
        setup = self.setup
        everything = list(self.params.numbered())
        setup.partition.admit([(name, p) for _, name, p, _ in everything], str(setup.spec))
        entries = [one for one in everything if one[2].grad is not None]
        if setup.spec.options.get("offload_gradients") is True and setup.release is None:
            setup.homes.settle()
            for _, name, p, _ in entries:
                setup.homes.of(name).bring(name, p)
        layouts = self.params.layouts_of(entries)
        gradients, ready = [], []
        for (_, name, p, group), layout in zip(entries, layouts, strict=True):
            g = self.local_gradient(layout, p)
            gradients.append((name, g))
            ready.append(self._check(p, group, layout, self.own(layout, p, g)))
        return gradients, ready

    def check(self, entries: Sequence[Entry], gradients: Sequence[Tensor]) -> list[Ready]:
        """These parameters with what is stepped here of them and of their gradients, each held against its layout, and
        its state with it. RuntimeError for what does not fit, before anything is stepped or counted. ``p.grad`` is not
        looked at: it is another thread's where gradients are released."""
        both = zip(entries, self.params.layouts_of(entries), gradients, strict=True)
        return [self._check(p, group, layout, g) for (_, _, p, group), layout, g in both]

    def _check(self, p: Tensor, group: dict[str, Any], layout: ParamLayout, g: Tensor) -> Ready:
        local = self.setup.partition.local(p, layout.rows, p)
        layout.check_gradient(local, g, cut=not self.setup.partition.plannable)
        self.store.check(Resolved(layout, p, group), local)
        return Ready(layout, p, group, local, g)

    def _is_skipped(self, scaler: Scaler, gradients: Sequence[tuple[str, Tensor]], ready: Sequence[Ready]) -> bool:
        setup = self.setup
        if setup.capturable:
            kernels.check_capturable([(one.layout, one.p) for one in ready], setup.partition.world_size)
        if grad_scaler.unscale(scaler.found_inf, scaler.grad_scale, gradients):
            self.skipped += 1
            return True
        if setup.nonfinite == "propagate":
            return False
        return self.stopped_by(setup.partition.agree(non_finite(gradients), [one.p for one in ready]))

    def step_some(self, ready: Sequence[Ready]) -> list[Work]:
        """Step what :meth:`check` has found to fit."""
        setup = self.setup
        setup.check_whole()
        setup.homes.check()
        self.store.allocate_missing([Resolved(*one[:3]) for one in ready])
        works = [self._work(one) for one in ready]
        parameters = [one.p for one in ready]

        def run(some: Sequence[Work]) -> None:
            setup.engine.step(some, setup.partition, setup.seed)

        with setup.integrity.changing("a step"):  # whatever can be refused has been refused before
            for first, stop in setup.partition.buckets(parameters):  # one travels while the next is stepped
                setup.homes.step(setup.partition.gather(works[first:stop]), run)
                count_steps(works[first:stop])
                setup.partition.publish(parameters[first:stop])
            setup.partition.finish()
        increment_version(parameters)
        for work in works:
            self.params.live.note_state(work.name, work.state)
        return works

    def _work(self, one: Ready) -> Work:
        state, groups = self.store.state[one.p], self.setup.partition.groups(one.p)
        return Work(one.layout, one.local, one.gradient, state, int(state["step"]) + 1, one.group, groups)

    def local_gradient(self, layout: ParamLayout, p: Tensor) -> Tensor:
        """What is here of the gradient; of a replicated parameter the whole, whose NaN every rank must see."""
        g = check_gradient(layout.name, p)
        return g if type(g) is Tensor else self.setup.partition.local(p, layout.rows, g)

    def own(self, layout: ParamLayout, p: Tensor, g: Tensor) -> Tensor:
        """Of a gradient from :meth:`local_gradient`, the rows that are stepped here."""
        return self.setup.partition.local(p, layout.rows, g) if g is p.grad else g

    def stopped_by(self, bad: Sequence[str]) -> bool:
        """Whether a step does not happen because these gradients have NaN or Inf; it is counted, and said once."""
        if not bad:
            return False
        shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        if self.setup.nonfinite == "raise":
            raise FloatingPointError(f"NaN or Inf in the gradient of {shown}; nothing was changed")
        if not self.skipped:
            warnings.warn(
                f"NaN or Inf in the gradient of {shown}: this step was skipped, parameters and state are as they "
                "were. Later skips are only counted, in optimizer.skipped_steps.",
                stacklevel=6,
            )
        self.skipped += 1
        return True
