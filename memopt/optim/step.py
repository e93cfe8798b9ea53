"""The step: gradients checked, state fetched, stepped and written back, steps counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
from torch import Tensor
from torch.autograd.graph import increment_version  # kernels write where autograd does not look

from memopt import kernels
from memopt.core.user_warning import warn
from memopt.layout.param_step import Work, count_steps
from memopt.optim.gradient_policy import GradientPolicy, Scaler, bounds_of
from memopt.optim.layouts import NumberedParam
from memopt.optim.params import Resolved
from memopt.optim.reports import Reports
from memopt.optim.state_store import StateStore
from memopt.placements.gradients.checks import check_gradient, look
from memopt.placements.gradients.host_grad import on_host
from memopt.placements.host_cores import HostCores, taken
from memopt.rules.matrices import matrices

if TYPE_CHECKING:
    from memopt.layout.param import ParamLayout

#: No gradient is multiplied by anything.
NO_SCALES: Mapping[int, float] = MappingProxyType({})


class Ready(NamedTuple):
    """A parameter that has a gradient, and what is stepped here of the two: of their layout."""

    layout: ParamLayout
    p: Tensor
    group: dict[str, Any]
    local: Tensor
    gradient: Tensor


@final
class Stepper:
    """``plan`` is the cached step: what was prepared for the tensors of the last one."""

    def __init__(self, store: StateStore) -> None:
        self.store, self.params, self.setup = store, store.params, store.setup
        self.plan: kernels.CachedStep | None = None
        self._captured: list[kernels.CachedStep] = []  # plans whose tables a CUDA graph reads
        self._cores: HostCores | None = None  # of the last step, where it ran on the host beside a device
        self._told = False  # whether a rank without cores was told so
        self.gradients = GradientPolicy(self.params)
        self.reports = Reports()

    def step(self, scaler: Scaler) -> None:
        """One step of every parameter that has a gradient."""
        setup, groups = self.setup, self.params.owner.param_groups
        self.params.live.check_values(groups, setup.spec)
        if setup.integrity.marks or setup.unfinished is not None:
            setup.check_whole()
        if setup.release is None and self._run_cached(scaler):  # the tensors of the last step, with new gradients
            return
        self.store.notice_replaced()
        with setup.partition.step_context(groups):
            self._cores = self._host_cores((name, p) for name, p, _ in self.params.entries())
            with self._released(), taken(self._cores):
                gradients, ready = self._collect_gradients()
                scales = self._look(scaler, gradients, ready)
                if scales is not None:
                    works = self.step_some(ready, scales)
                    self._cache(works, scaler)
                self.reports.tell(groups, setup.spec)  # of parameters that were released, whatever the others do
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
            bounds_of(owner.param_groups),
        )

    def _run_cached(self, scaler: Scaler) -> bool:
        """Repeat the last step where it was prepared for what is there now."""
        plan = self.plan
        if plan is None:
            return False
        plan.check_recording()
        self.synchronize()
        context = self._context(scaler)
        if not plan.refresh(context):
            return False
        if plan.recorded and plan not in self._captured:
            self._captured.append(plan)
        with taken(self._cores):
            return self._run(plan, context, scaler)

    def _run(self, plan: kernels.CachedStep, context: kernels.StepContext, scaler: Scaler) -> bool:
        parameters = plan.parameters
        scales: Sequence[float] | None
        if plan.on_device:
            bad, _ = plan.look(context.bounds is not None)
            scales = None if self.gradients.stopped_by(bad) else ()
            self.gradients.norm = plan.norm
        else:
            scales = self.gradients.scales(scaler, context.bounds, parameters, plan.look)
        if scales is not None and not self.gradients.stopped_by(plan.step(scales)):
            increment_version(parameters)
            for rule, p, numbers in plan.reported():
                sums = self.reports.of(rule, self.setup.partition.groups(p), torch.device("cpu"))
                sums += torch.tensor(numbers, dtype=torch.float64)
            self.reports.tell(context.groups, context.spec)
        if self.setup.placement_stores.durable is not None:
            self.store.commit()
        return True

    def _cache(self, works: Sequence[Work], scaler: Scaler) -> None:
        # A step without any gradient leaves the plan, which counts, to the next one; what a release leaves over is
        # another every time.
        if works and self.setup.release is None:
            stores = self.setup.placement_stores
            originals = {i: p for i, _, p, _ in self.params.numbered()}
            plannable = self.setup.partition.plannable
            context = self._context(scaler)
            self.plan = kernels.make_cached_step(context, works, originals, stores, self.plan) if plannable else None

    def synchronize(self) -> None:
        """Take note of what became of the last step, where kernels run beside the host."""
        outcome = self.plan.synchronize() if self.plan is not None else None
        if outcome is not None:
            if outcome.names:
                self.gradients.stopped_by(outcome.names)
            else:
                self.gradients.skipped += outcome.skipped

    # The step without a cache ----------------------------------------------------------------------------------

    @contextmanager
    def _released(self) -> Iterator[None]:
        """Around a step that ends what gradient release has begun in ``backward()``."""
        release, before = self.setup.release, self.gradients.skipped
        try:
            yield
        except BaseException:
            self.reports.clear()
            if release is not None:
                release.give_up()
            raise
        if release is not None:
            release.end_step(counted=self.gradients.skipped > before)

    def _collect_gradients(self) -> tuple[list[tuple[str, Tensor]], list[Ready]]:
        """What has a gradient, checked: the gradients as they are here, and what is stepped here."""
        setup = self.setup
        everything = list(self.params.numbered())
        setup.partition.validate_params([(name, p) for _, name, p, _ in everything], str(setup.spec))
        entries = [one for one in everything if one[2].grad is not None]
        if setup.spec.options.get("offload_gradients") is True and setup.release is None:
            setup.placement_stores.synchronize()
            for _, name, p, _ in entries:
                setup.placement_stores.of(name).prefetch_grad(name, p)
        layouts = self.params.layouts_of(entries)
        gradients, ready = [], []
        for (_, name, p, group), layout in zip(entries, layouts, strict=True):
            g = self.local_gradient(layout, p)
            gradients.append((name, g))
            ready.append(self._check(p, group, layout, self.own(layout, p, g)))
        return gradients, ready

    def check(self, entries: Sequence[NumberedParam], gradients: Sequence[Tensor]) -> list[Ready]:
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

    def _look(
        self, scaler: Scaler, gradients: Sequence[tuple[str, Tensor]], ready: Sequence[Ready]
    ) -> dict[int, float] | None:
        """The scales of a step without a plan, by identity of the group."""
        setup, groups = self.setup, self.params.owner.param_groups
        if setup.capturable:
            kernels.check_capturable([(one.layout, one.p) for one in ready], setup.partition.world_size)

        bounds = bounds_of(groups)
        if bounds is not None and setup.release is not None:
            raise RuntimeError(
                "max_grad_norm needs the norm of all gradients before the first parameter steps, and gradients are "
                "released: use opt.release_gradients(model, max_norm=…), which takes it in a backward pass of its own"
            )
        scales = self.gradients.scales(scaler, bounds, [one.p for one in ready], partial(look, gradients))
        if scales is None:
            return None
        return {id(group): scale for group, scale in zip(groups, scales, strict=True) if scale != 1}

    def step_some(self, ready: Sequence[Ready], scales: Mapping[int, float] = NO_SCALES) -> list[Work]:
        """Step what :meth:`check` has found to fit, the gradients of each group multiplied by its number."""
        setup = self.setup
        setup.check_whole()
        setup.placement_stores.check()
        state = self.store.state
        self.store.allocate_missing([Resolved(*one[:3]) for one in ready if not state.get(one.p)])
        works = [self._work(one, state[one.p], scales.get(id(one.group), 1.0)) for one in ready]
        parameters = [one.p for one in ready]
        cores = self._host_cores((one.layout.name, one.p) for one in ready)

        def run(some: Sequence[Work]) -> None:
            setup.engine.step(some, setup.partition, setup.seed)

        # Whatever can be refused has been refused before.
        with setup.integrity.changing("a step"), taken(cores):
            whole = [bool(work.shares) for work in works]
            for first, stop in setup.partition.buckets(parameters, whole):  # one travels while the next is stepped
                setup.placement_stores.step(setup.partition.gather(works[first:stop]), run)
                count_steps(works[first:stop])
                setup.partition.all_gather_begin(parameters[first:stop])
            setup.partition.all_gather_wait()
        increment_version(parameters)
        for work in works:
            self.params.live.note_state(work.name, work.state)
        return works

    def _host_cores(self, parameters: Iterable[tuple[str, Tensor]]) -> HostCores | None:
        cores = self.setup.placement_stores.host_cores(parameters)
        if cores is not None and not self._told:
            self._told = True
            said = cores.starved(torch.get_num_threads())
            if said:
                warn(said)
        return cores

    def _work(self, one: Ready, state: dict[str, Any], scale: float) -> Work:
        partition = self.setup.partition
        groups = partition.groups(one.p)
        exchanged = groups and one.layout.rule.whole_matrices and not matrices(one.layout.rows.shape).stacked
        shares = partition.shares(one.p) if exchanged else ()
        step = int(state["step"]) + 1
        sums = self.reports.of(one.layout.rule, groups, one.local.device) if one.layout.rule.reports else None
        return Work(
            one.layout, one.local, one.gradient, state, step, one.group, groups, scale, shares, one.p.device, sums
        )

    def local_gradient(self, layout: ParamLayout, p: Tensor) -> Tensor:
        """What is here of the gradient; of a replicated parameter the whole, whose NaN every rank must see."""
        g = check_gradient(layout.name, p)
        return g if type(g) is Tensor else on_host(self.setup.partition.local(p, layout.rows, g))

    def own(self, layout: ParamLayout, p: Tensor, g: Tensor) -> Tensor:
        """Of a gradient from :meth:`local_gradient`, the rows that are stepped here."""
        return self.setup.partition.local(p, layout.rows, g) if g is p.grad else g
