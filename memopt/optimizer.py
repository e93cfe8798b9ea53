"""The one ``torch.optim.Optimizer``: rule × format × placement × partition, chosen by a spec."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version  # kernels write where autograd does not look

from memopt import amp, kernels
from memopt.engines import ENGINES
from memopt.engines.work import Work, count_steps
from memopt.gradients import POLICIES, check_gradient, non_finite
from memopt.groups import STEPPED, named_groups
from memopt.hyper import SpecError
from memopt.integrity import Integrity
from memopt.keeper import Keeper
from memopt.layout.check import check
from memopt.live_groups import LiveGroups, has_shape
from memopt.optim.layouts import Layouts
from memopt.partitions import PARTITIONS
from memopt.partitions.flat import check_replaced
from memopt.placements.homes import Homes
from memopt.rules import RULES
from memopt.spec import OptimSpec, parse

if TYPE_CHECKING:
    from memopt.checkpoint.report import Conversion
    from memopt.layout.param import ParamLayout
    from memopt.release import Release


class Ready(NamedTuple):
    """A parameter that has a gradient, and what is stepped here of the two: of their layout."""

    layout: ParamLayout
    p: Tensor
    group: dict[str, Any]
    local: Tensor
    gradient: Tensor


class Optimizer(Keeper):
    """An ordinary optimizer whose state is what ``spec`` says. Made by :func:`memopt.create`.

    State keys are a moment's name (``exp_avg``) or name and part (``exp_avg.codes``), and ``step``, an fp32 number in
    host memory. State is made at a parameter's first step, or by :meth:`init_state`.

    ``nonfinite`` is the policy for NaN and Inf in gradients: ``"skip"`` leaves parameters, state and step counts as
    they were and counts the step in ``skipped_steps`` (a warning names the parameters the first time); ``"raise"``
    raises FloatingPointError before anything changes; ``"propagate"`` does not look, as torch.optim. Where kernels run
    beside the host (CUDA), a skipped step is counted when the next one begins or when ``skipped_steps`` or a state_dict
    is asked for: until then ``state[p]["step"]`` has counted it.

    ``capturable=True`` keeps ``step`` on the parameter's device, so that a step can be part of a CUDA graph; it needs
    kernels that run there for every parameter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        spec: str | OptimSpec,
        *,
        nonfinite: str = "skip",
        seed: int = 0,
        process_group: Any = None,
        capturable: bool = False,
        **fields: Any,
    ) -> None:
        from memopt.pricing import spec_fields

        spec = parse(spec, **spec_fields(fields))
        if nonfinite not in POLICIES:
            raise SpecError(f"nonfinite={nonfinite!r} is not allowed; it must be one of {', '.join(POLICIES)}")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise SpecError(f"seed={seed!r} is not allowed; it must be an integer")
        if not isinstance(capturable, bool):
            raise SpecError(f"capturable={capturable!r} is not allowed; it must be True or False")
        if capturable and spec.engine != "native":
            raise SpecError(f"capturable=True is not allowed with engine={spec.engine!r}; the engine for it is native")
        if capturable and spec.placements - {"device", "paged"}:
            raise SpecError(f"capturable=True is not allowed with '{spec}': a CUDA graph cannot stream state")
        self.spec = spec
        self.nonfinite = nonfinite
        self.seed = seed
        self.capturable = capturable
        self._skipped = 0
        self._configure(process_group)
        super().__init__(named_groups(params), spec.resolve())
        self.spec = spec.for_names([name for name, _, _ in self._parameters()])
        self.homes.spec = self.spec
        self.homes.expect(
            lambda: {
                name: self._lines(name, p, group)[1:]
                for name, p, group in self._parameters()
                if has_shape(p) and p.dtype in STEPPED
            }
        )
        self._check_left(process_group)

    def _check_left(self, process_group: Any) -> None:
        """Raise RuntimeError, on every rank, where an earlier run left the ranks at different steps."""
        left = self.homes.left() if self.partition.world_size > 1 else None
        if left is None:
            return
        from memopt.checkpoint.ranks import Ranks

        steps = [max(found.values(), default=0.0) for found in Ranks(process_group).gather(left)]
        if len(set(steps)) > 1:
            self.homes.close()
            said = ", ".join(f"rank {rank}: {step:.0f}" for rank, step in enumerate(steps))
            raise RuntimeError(
                f"disk: an earlier run was ended while some ranks had committed a step and others had not ({said} "
                "steps); their state is of two steps. Load a checkpoint, with another directory"
            )

    def _configure(self, process_group: Any = None) -> None:
        self.integrity = Integrity()
        self.rule = RULES[self.spec.rule]
        self.engine = ENGINES[self.spec.engine]
        self.engine.require()
        self.partition = PARTITIONS[self.spec.partition](process_group)
        self.process_group = process_group
        self.homes = Homes(self.spec, self.partition.rank, self.partition.world_size)
        self._layouts = Layouts()
        self._plan: kernels.Plan | None = None
        self._captured: list[kernels.Plan] = []  # plans whose tables a CUDA graph reads
        self.release: Release | None = None
        self._live = LiveGroups()
        self._made_for, self._seen_ids, self._unshaped = [], [], []

    # The step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; ``closure`` re-evaluates the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._live.check_values(self.param_groups, self.spec)
        if self.release is not None and getattr(self, "grad_scale", None) is not None:
            raise RuntimeError(
                "torch.amp.GradScaler cannot be used with released gradients: parameters step inside "
                "backward(), before it has unscaled them, and this backward pass has stepped them "
                "with scaled gradients. Train in bfloat16, which needs no scaler"
            )
        if self.integrity.marks or self.unfinished is not None:
            self._check_finished()
        plan = self._plan if self.release is None else None  # what a release leaves over is another every time
        if plan is not None and plan.refresh(self):  # the tensors of the last step, with new gradients
            if self.nonfinite == "propagate" or not self._stopped_by(plan.non_finite()):
                plan.step(self.seed)
                increment_version(plan.parameters)
            return loss
        check_replaced(self)
        with self.partition.at_step(self.param_groups):
            before = self._skipped
            try:
                self._step_anew()
            except BaseException:
                if self.release is not None:
                    self.release.give_up()
                raise
            if self.release is not None:
                self.release.finish(counted=self._skipped > before)
            self._commit()
        return loss

    def _step_anew(self) -> None:
        """A step of whatever has a gradient now, without a plan."""
        entries = [(i, name, p, group) for i, (name, p, group) in enumerate(self._parameters()) if p.grad is not None]
        self.partition.admit([(name, p) for name, p, _ in self._parameters()], str(self.spec))
        if self.spec.options.get("offload_gradients") is True and self.release is None:
            self.homes.settle()
            for _, name, p, _ in entries:
                self.homes.of(name).bring(name, p)
        gradients = [(name, self._local_gradient(name, p)) for _, name, p, _ in entries]
        ready = self._check(entries, [self._own(entry[2], g) for entry, (_, g) in zip(entries, gradients, strict=True)])
        if self.capturable:
            kernels.check_capturable([(one.layout, one.p) for one in ready], self.partition.world_size)
        if amp.stopped_by_scaler(self, gradients):
            return
        if self.nonfinite != "propagate":
            bad = self.partition.agree(non_finite(gradients), [one.p for one in ready])
            if self._stopped_by(bad):
                return
        works = self._step_some(ready)
        if works and self.release is None:  # a step without any gradient leaves the plan, which counts, to the next one
            self._plan = kernels.make_plan(self, works) if self.partition.plannable else None

    def _check(
        self, entries: Sequence[tuple[int, str, Tensor, dict[str, Any]]], gradients: Sequence[Tensor]
    ) -> list[Ready]:
        """These parameters with what is stepped here of them and of their gradients, each held against its layout, and
        its state with it. RuntimeError for what does not fit, before anything is stepped or counted. ``p.grad`` is not
        looked at: it is another thread's where gradients are released."""
        ready = []
        for (_, _, p, group), layout, g in zip(entries, self._layouts_of(entries), gradients, strict=True):
            local = self.partition.local(p, layout.rows, p)
            check(layout, local, g, cut=not self.partition.plannable)
            self._check_state(layout, p, local, group)
            ready.append(Ready(layout, p, group, local, g))
        return ready

    def _step_some(self, ready: Sequence[Ready]) -> list[Work]:
        """Step what :meth:`_check` has found to fit."""
        self._check_finished()
        self.homes.check()
        self._allocate_missing([one[:3] for one in ready])
        works = [
            Work(one.layout, one.local, one.gradient, state, int(state["step"]) + 1, one.group, groups)
            for one, state, groups in ((one, self.state[one.p], self.partition.groups(one.p)) for one in ready)
        ]
        parameters = [one.p for one in ready]

        def run(some: Sequence[Work]) -> None:
            self.engine.step(some, self.partition, self.seed)

        with self.integrity.changing("a step"):  # whatever can be refused has been refused before
            for first, stop in self.partition.buckets(parameters):  # one travels while the next is stepped
                self.homes.step(self.partition.gather(works[first:stop]), run)
                count_steps(works[first:stop])
                self.partition.publish(parameters[first:stop])
            self.partition.finish()
        increment_version(parameters)
        for work in works:
            self._live.note_state(work.name, work.state)
        return works

    def _local_gradient(self, name: str, p: Tensor) -> Tensor:
        """What is here of the gradient; of a replicated parameter the whole, whose NaN every rank must see."""
        g = check_gradient(name, p)
        return g if type(g) is Tensor else self.partition.local(p, self._rows(p), g)

    def _own(self, p: Tensor, g: Tensor) -> Tensor:
        """Of a gradient from :meth:`_local_gradient`, the rows that are stepped here."""
        return self.partition.local(p, self._rows(p), g) if g is p.grad else g

    @property
    def skipped_steps(self) -> int:
        """Steps that did not happen because of NaN or Inf, or because torch.amp.GradScaler's scale was too large."""
        self.settle()
        return self._skipped + (self._plan.skipped_on_device() if self._plan is not None else 0)

    @skipped_steps.setter
    def skipped_steps(self, count: int) -> None:
        self._skipped += count - self.skipped_steps

    def settle(self) -> None:
        """Take note of what became of the last step, where kernels run beside the host."""
        if self._plan is not None:
            self._plan.settle()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler hands over its scale instead of unscaling: to kernels that work beside the host,
        and where gradients are released, to be refused."""
        if self.release is not None:
            return True
        return self.nonfinite == "skip" and self._plan is not None and self._plan.takes_scale

    def _stopped_by(self, bad: list[str]) -> bool:
        if not bad:
            return False
        shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        if self.nonfinite == "raise":
            raise FloatingPointError(f"NaN or Inf in the gradient of {shown}; nothing was changed")
        if not self._skipped:
            warnings.warn(
                f"NaN or Inf in the gradient of {shown}: this step was skipped, parameters and state are as they "
                "were. Later skips are only counted, in optimizer.skipped_steps.",
                stacklevel=3,
            )
        self._skipped += 1
        return True

    def release_gradients(self, model: torch.nn.Module, *, max_norm: float | None = None) -> Release:
        """Step each parameter inside ``backward()`` as soon as its gradient is there, and free the gradient.

        Keep the loop as it is: ``loss.backward(); opt.step(); opt.zero_grad()``. ``opt.step()`` ends the step (and
        steps parameters that have a gradient from elsewhere). Parameters are those of the plain step, and at most one
        gradient is there at a time. What needs all gradients at once is refused, or costs a second backward pass:
        with ``max_norm`` a step is ``loss.backward(retain_graph=True); loss.backward(); opt.step()``, the first of
        which only measures the norm. See ``docs/release.md`` for accumulation, NaN and Inf, GradScaler,
        DistributedDataParallel and FSDP2.

        Returns the :class:`~memopt.release.Release`, whose ``remove()`` ends it. Raises RuntimeError with the reason
        for a model that it cannot work with.
        """
        from memopt.release import Release

        if max_norm is not None and not (isinstance(max_norm, (int, float)) and max_norm > 0):
            raise SpecError(f"max_norm={max_norm!r} is not allowed; it must be a number > 0, or None")
        if self.capturable:
            raise RuntimeError(
                "capturable=True steps all parameters at once, in opt.step(); released gradients step "
                "one by one inside backward(); use one of them"
            )
        self._check_finished()
        self.settle()
        if self.release is not None:
            self.release.remove()
        self.release = Release(self, model, max_norm)
        self._watch()
        return self.release

    # Another spec ----------------------------------------------------------------------------------------------

    def convert_(self, spec: str | OptimSpec, *, fill: Mapping[str, Any] | None = None, **fields: Any) -> Conversion:
        """Change the spec in place, in the middle of training; schedulers, groups and references stay valid.

        Each moment is decoded and encoded again (copied where its encoding stays), one parameter at a time. Engine,
        overrides and hyperparameters stay unless ``fields`` says otherwise; a full :class:`OptimSpec` means what it
        says. ``fill`` says what stands in for a moment that was not kept: ``{"exp_avg": 0}``, or the name of another
        moment. Returns the relative error of every moment. Raises SpecError before anything changes, and RuntimeError
        where memory or disk gives out: then some parameters may be as the new spec says. Overrides say which where
        formats and places change; else the same call goes on with the rest, and the optimizer does nothing before.
        """
        from memopt.checkpoint.convert import convert_

        return convert_(self, spec, fill=fill, **fields)

    # Rows of state ---------------------------------------------------------------------------------------------

    def select_rows(self, p: Tensor, index: Tensor | Sequence[int], *, into: torch.nn.Parameter | None = None) -> None:
        """The weight ``p`` and its state become the rows ``index`` of what they are: pruned, reordered, cloned.

        Args:
            p: a parameter of this optimizer, [R, …]; a row is one index of dimension 0.
            index: int [n], rows from 0 to R - 1 in the order wanted, twice for a clone; or a mask, bool [R].
            into: another Parameter [n, …] that takes the place of ``p``, with the weights that it has. Without it
                ``p`` stays the same object and its data become ``p[index]``; if its data are [n, …] already while its
                state still is of R rows, only the state follows.

        Rows that stay keep their codes bit for bit (vectors whose blocks are coded, and weights that become large
        enough to be coded or too small for it, are encoded again). A factored moment's column means become those of
        the rows that are left. The number of steps stays. ``p.grad`` is dropped.

        Raises:
            ValueError: for another optimizer's parameter, or an ``into`` of another shape, dtype or device.
            IndexError: for a row that is not there.
            RuntimeError: for sharded parameters, and while gradients are released.

        Example::

            keep = model.embed.weight.norm(dim=1) > 0.1
            opt.select_rows(model.embed.weight, keep)
        """
        from memopt.surgery import select_rows

        select_rows(self, p, index, into)

    def append_rows(self, p: Tensor, rows: Tensor | None = None, *, into: torch.nn.Parameter | None = None) -> None:
        """The weight ``p`` has more rows, whose moments begin at zero: an extended vocabulary, clones and splits.

        Args:
            p: a parameter of this optimizer, [R, …]; a row is one index of dimension 0.
            rows: weights [n, …] to append. Without them ``p`` (or ``into``) has its new rows already, as after
                ``model.resize_token_embeddings``, and its state follows.
            into: another Parameter [R + n, …] that takes the place of ``p``.

        The rows that were there keep their state bit for bit, as :meth:`select_rows` says; slow weights of new rows
        begin as the weights. The number of steps is the parameter's and stays, as in torch.optim where zeros are
        appended to its moments. Raises as :meth:`select_rows`.

        Example::

            model.resize_token_embeddings(len(tokenizer))
            opt.append_rows(model.get_input_embeddings().weight)
        """
        from memopt.surgery import append_rows

        append_rows(self, p, rows, into)

    def reset_state(
        self,
        parameters: Tensor | Iterable[Tensor] | None = None,
        moments: str | Iterable[str] | None = None,
        *,
        rows: Tensor | Sequence[int] | None = None,
        step: int | None = None,
    ) -> None:
        """Moments begin anew: at zero, slow weights as the weights. ReLoRA's restarts, and rows that were replaced.

        Args:
            parameters: one, several, or all of this optimizer (None). One that has no state yet stays as it is.
            moments: names (``"exp_avg"``), or all of the rule (None).
            rows: int [n] or a mask, bool [R]: only these rows, the same of every parameter given.
            step: the number of steps from now on; ``0`` begins the bias correction anew. None leaves it.

        What a master keeps beside a 16-bit weight is the weight's and stays. Raises SpecError for a moment that a
        parameter does not have, IndexError for a row that is not there; nothing has been changed then.

        Example::

            opt.reset_state([p for n, p in model.named_parameters() if "lora_" in n], step=0)
        """
        from memopt.surgery import reset_state

        reset_state(self, parameters, moments, rows, step)

    # Looking ---------------------------------------------------------------------------------------------------

    def explain(self) -> str:
        """What runs and where, and every place where that is not literally what the spec asked for."""
        from memopt.explain import explain

        self._check_finished()
        return explain(self)

    def __repr__(self) -> str:
        count = sum(len(group["params"]) for group in self.param_groups)
        return f"memopt.Optimizer({self.spec!s}, {count} parameters, state {self.ledger().nbytes:,} bytes)"
