"""A whole optimizer's step on one device, prepared once: tables stay on the device, and a step sends what changed.

As ``memopt/kernels/cached_step.py`` for the CPU. Nothing here waits for the device, with one exception:
``nonfinite="raise"`` must know before it goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.kernels.cached_entries import CachedEntries, CachedParam, record
from memopt.kernels.context import StepOutcome
from memopt.kernels.triton import tables
from memopt.kernels.triton.available import capturing
from memopt.kernels.triton.device import fields as f
from memopt.kernels.triton.launcher import Launcher
from memopt.kernels.triton.launchers import Launchers
from memopt.kernels.triton.upload import write_by_value

if TYPE_CHECKING:
    from memopt.kernels.context import StepContext, Stores
    from memopt.kernels.huge_pages import Pages
    from memopt.layout.param_step import Work
    from memopt.rules import Rule


class TritonCachedStep(CachedEntries):
    """The tables of all parameters that have had a gradient; made by :func:`make`."""

    pages: Pages | None = None
    on_device = True

    def __init__(
        self, context: StepContext, records: Sequence[CachedParam], made: Sequence[tables.Tensors], launcher: Launcher
    ) -> None:
        super().__init__(context, records)
        self.made = made
        self.nonfinite, self.capturable, self.integrity = context.nonfinite, context.capturable, context.integrity
        self.launcher = launcher
        # Whether the kernels count on a gradient's alignment.
        self.aligned = [bucket.align > 1 for bucket in launcher.buckets]
        self.counters = [one.state["step"] for one in records]
        self.stepping = self.counters  # those of this step
        #: Flags on their way to the host, when they are there, and the counters of that step.
        self.pending: tuple[Tensor, Any, list[Tensor]] | None = None
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None
        #: That of all gradients of the last step, fp32 []; None where nobody asked for it.
        self.norm: Tensor | None = None
        self.steps = [0.0] * len(records)

    # Before a step ---------------------------------------------------------------------------------------------

    def check_recording(self) -> None:
        """Raise RuntimeError for a step that a CUDA graph records and that counts on the host."""
        if not self.capturable and capturing(self.launcher.device):
            raise RuntimeError("a step inside a CUDA graph counts on the device: memopt.create(..., capturable=True)")

    def refresh(self, context: StepContext) -> bool:
        """Take this step's gradients and hyperparameters; False if anything else is not as it was."""
        addresses = self.gradients(context) if self.same(context) else None
        if addresses is None:
            return False
        # 0 is said of those that have none; an empty one that is there has no address either, and nothing is read.
        there = [a >= 0 for a in addresses]
        addresses = [max(a, 0) or tables.VECTOR * yes for a, yes in zip(addresses, there, strict=True)]
        if any(a % tables.VECTOR for a, yes in zip(addresses, self.aligned, strict=True) if yes):
            return False
        self.stepping = self.counters if all(there) else [x for x, yes in zip(self.counters, there, strict=True) if yes]
        self.nonfinite = context.nonfinite
        launcher = self.launcher
        self.recorded = self.recorded or capturing(launcher.device)
        launcher.gradients.set(addresses)
        if not self.capturable:
            self.steps = (torch.stack(self.counters) + 1).tolist() if self.counters else []
        bounds = context.bounds or [None] * len(self.groups)
        arguments = zip(self.rules, self.groups, repeat(1.0), bounds, strict=False)
        rows = [tables.hyper_row(*one) for one in arguments]
        self.launcher.numbers.set([*(number for row in rows for number in row), *self.steps])
        for i, group in enumerate(self.groups):
            for key in tables.rates_on_device(group):
                self.launcher.hyper[i * f.HYPER.value + tables.RATES[key]].copy_(group[key])
        # torch.amp.GradScaler's are where the loss is, which is another device in a model cut across several.
        self.found_inf, self.grad_scale = (
            None if x is None else x.reshape(1).to(launcher.device, torch.float32, non_blocking=True)
            for x in (context.found_inf, context.grad_scale)
        )
        if context.bounds is None:
            launcher.norm.zero_()
        self.norm = None
        return True

    def look(self, summed: bool) -> tuple[list[str], list[float]]:
        """Look at the gradients on the device. The kernels heed what they find themselves; only ``"raise"`` waits."""
        self.launcher.flags.zero_()
        if summed or self.nonfinite != "propagate":
            self.launcher.look(summed, self.grad_scale)
        if summed:
            self.norm = self.launcher.norm.clone().squeeze(0)  # the next step writes the other
        if self.nonfinite == "propagate":
            self.launcher.flags.zero_()
        return self._names(self.launcher.flags) if self.nonfinite == "raise" else [], []

    def _names(self, flags: Tensor) -> list[str]:
        found = flags.tolist()
        return [name for name, bad in zip(self.names, found, strict=False) if bad] if found[-2] else []

    def rehearse(self, context: StepContext) -> None:
        """Launch all that the step before did without a plan, and what only a capture does: nothing can be compiled or
        loaded any more while a CUDA graph is captured."""
        if self.refresh(context):
            launcher = self.launcher
            for table in (launcher.gradients, launcher.numbers):
                write_by_value(table.tensor, table.values)
            launcher.look(context.bounds is not None)

    # The step --------------------------------------------------------------------------------------------------

    def step(self, scales: Sequence[float]) -> list[str]:
        """Step all parameters, unless the kernels find that this step does not happen; they find the scales, too."""
        with self.integrity.changing("a step"):  # one launch for each kind of parameter
            self.launcher.run(self.found_inf, self.grad_scale)
            if not self.capturable:
                torch._foreach_add_(self.stepping, 1)
                if self.nonfinite == "skip" or self.found_inf is not None:
                    self._send_flags()
        return []

    def _send_flags(self) -> None:
        """Send what became of this step to the host; :meth:`synchronize` reads it, by then it has arrived."""
        flags = self.launcher.flags
        if flags.device.type != "cuda":
            self.pending = flags.clone(), None, self.stepping
            return
        with self.launcher.guard():  # an event is of the current device's stream
            host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            host.copy_(flags, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.pending = host, arrived, self.stepping

    def reported(self) -> list[tuple[Rule, Tensor, list[float]]]:
        """No rule with a kernel here reports anything."""
        return []

    def synchronize(self) -> StepOutcome | None:
        """Where the last step did not happen, count it so and say so: called before anybody looks at the numbers of
        steps."""
        if self.pending is None:
            return None
        flags, arrived, counters = self.pending
        self.pending = None
        if arrived is not None:
            arrived.synchronize()
        if not int(flags[-1]):
            return None
        with self.integrity.changing("counting a step that was skipped"):
            torch._foreach_sub_(counters, 1)
        return StepOutcome(1, self._names(flags))  # without names torch.amp.GradScaler looks for a smaller scale

    def skipped_on_device(self) -> int:
        """Steps that the kernels left out, where the host does not count them; waits for the device."""
        return int(self.launcher.skipped) if self.capturable else 0


def refuse_work(work: Work, world_size: int) -> str | None:
    """Why the kernels cannot take this parameter and this gradient as they lie, or None."""
    reason = tables.refuse(work.layout, work.p, world_size)
    if reason:
        return reason
    if work.g.dtype not in tables.TYPES or not work.g.is_contiguous() or work.g.device != work.p.device:
        return "its gradient is not contiguous, or of another device or dtype"
    return None if all(x.device == work.p.device for x in _parts(work)) else "its state is not on its device"


def _parts(work: Work) -> list[Tensor]:
    """The tensors of its state that the kernels read and write."""
    return [work.state[key] for key in work.layout.tensors]


def describe_all(works: Sequence[Work], seed: int, groups: Sequence[Any], counters: bool) -> list[tables.Tensors]:
    """``counters``: whether ``state["step"]`` is on the device and counted there."""
    numbers = {id(group): i for i, group in enumerate(groups)}
    return [
        tables.Tensors(work, seed, numbers[id(work.h)], work.state["step"].data_ptr() if counters else 0)
        for work in works
    ]


_LAUNCHERS = Launchers(32 * 2**20)


def step(works: Sequence[Work], world_size: int, seed: int) -> list[Work]:
    """Step the parameters that the kernels can step, without a plan; returns the others."""
    left: list[Work] = []
    mine: dict[tuple[torch.device, str], list[Work]] = {}
    for work in works:
        if refuse_work(work, world_size):
            left.append(work)
        else:
            mine.setdefault((work.p.device, work.layout.rule.name), []).append(work)
    for (device, _), chosen in mine.items():
        scales: dict[int, float] = {}  # by identity of the group
        groups: list[Any] = []
        for work in chosen:
            if id(work.h) not in scales:
                groups.append(work.h)
            scales[id(work.h)] = work.scale
        rule = chosen[0].layout.rule
        launcher, places = _LAUNCHERS.find(rule, describe_all(chosen, seed, groups, False), device, len(groups))
        addresses, steps = [0] * len(launcher.buckets), [1.0] * len(launcher.buckets)
        for place, work in zip(places, chosen, strict=True):
            addresses[place], steps[place] = work.g.data_ptr(), float(work.step)
        launcher.gradients.set(addresses)
        on_host = [{**group, **{key: float(group[key]) for key in tables.rates_on_device(group)}} for group in groups]
        both = zip(on_host, groups, strict=True)
        numbers = [number for h, group in both for number in tables.hyper_row(rule, h, scales[id(group)])]
        launcher.numbers.set([*numbers, *steps])
        launcher.run()
    return left


def make(
    context: StepContext,
    works: Sequence[Work],
    originals: Mapping[int, Tensor],
    stores: Stores,
    before: object,
) -> TritonCachedStep | None:
    """A plan for these parameters, after they have stepped, and for those that ``before`` knew; None where not all of
    them can go this way."""
    one = len({work.p.device for work in works}) == 1
    # Sharded gradients are agreed on by the ranks.
    one = one and not context.spec.is_mixed  # a launcher is of one rule
    if context.spec.engine != "native" or context.partition.world_size > 1 or not one:
        return None
    for work in works:
        # A CUDA graph steps @paged without asking for its pages beforehand.
        placed = context.capturable or stores.in_place(work.name, work.p.device)
        counted = context.capturable or work.state["step"].device.type == "cpu"
        if not placed or not counted or work.p is not originals[work.index] or refuse_work(work, 1):
            return None
    tensors = describe_all(works, context.seed, context.groups, context.capturable)
    entries: dict[int, tuple[CachedParam, tables.Tensors]] = {}
    if isinstance(before, TritonCachedStep):
        both = zip(before.still_valid(context), before.made, strict=False)
        entries = {one.layout.index: (one, tensor.copy()) for one, tensor in both}
    for work, tensor in zip(works, tensors, strict=True):
        stepped = record(context, work, originals[work.index])
        if stepped is None:
            return None
        entries[work.index] = stepped, tensor
    records, made = zip(*(entries[index] for index in sorted(entries)), strict=True)
    launcher = Launcher(works[0].layout.rule, made, works[0].p.device, len(context.groups))
    if isinstance(before, TritonCachedStep) and before.launcher.device == launcher.device:
        launcher.skipped = before.launcher.skipped
    plan = TritonCachedStep(context, records, made, launcher)
    if context.capturable:
        plan.rehearse(context)
    return plan
