"""The one ``torch.optim.Optimizer``: rule × format × placement × partition, chosen by a spec."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt import amp, kernels
from memopt.engines import ENGINES
from memopt.engines.work import Work
from memopt.geometry import Rows
from memopt.gradients import POLICIES, check_gradient, non_finite
from memopt.groups import check_group, named_groups
from memopt.hyper import SpecError
from memopt.ledger import Ledger, Line, dtype_name
from memopt.partitions import PARTITIONS
from memopt.partitions.flat import check_replaced
from memopt.partitions.slab import check_slab
from memopt.placements.homes import Homes
from memopt.pricing import state_lines
from memopt.rules import RULES
from memopt.spec import OptimSpec, parse
from memopt.state import LoadPlan, plan_load

if TYPE_CHECKING:
    from memopt.checkpoint.report import Conversion
    from memopt.release import Release


class Optimizer(torch.optim.Optimizer):
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
        spec.check_overrides([name for name, _, _ in self._parameters()])
        self.homes.expect(lambda: {name: self._lines(name, p, group)[1:] for name, p, group in self._parameters()})

    def _configure(self, process_group: Any = None) -> None:
        self.rule = RULES[self.spec.rule]
        self.engine = ENGINES[self.spec.engine]
        self.engine.require()
        self.partition = PARTITIONS[self.spec.partition](process_group)  # type: ignore[call-arg]
        self.process_group = process_group
        self.homes = Homes(self.spec, self.partition.rank, self.partition.world_size)
        self._plan: kernels.Plan | None = None
        self._captured: list[kernels.Plan] = []  # plans whose tables a CUDA graph reads
        self.release: Release | None = None

    # Parameters and groups -------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's; a hyperparameter that the rule does not have, or a value that is not allowed,
        and a parameter that is already there raise an error and leave the optimizer as it was."""
        group = check_group(param_group, self.spec, {id(p) for g in self.param_groups for p in g["params"]})
        super().add_param_group(group)
        self._made_for = [tuple(p.shape) for g in self.param_groups for p in g["params"]]
        self._seen_ids = [id(p) for g in self.param_groups for p in g["params"]]

    def _parameters(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """``(name, parameter, group)`` in order; without names, the parameter's number."""
        index = 0
        for group in self.param_groups:
            names = group.get("param_names")
            if names is None or len(names) != len(group["params"]):  # DeepSpeed's vectors have no names
                names = [str(index + i) for i in range(len(group["params"]))]
            for name, p in zip(names, group["params"], strict=True):
                yield name, p, group
            index += len(group["params"])

    def _rows(self, p: Tensor) -> Rows:
        return self.partition.held(p)

    # State -----------------------------------------------------------------------------------------------------

    def init_state(self) -> None:
        """Allocate the state of every parameter that requires a gradient; zeros, as before the first step."""
        self.partition.admit([(name, p) for name, p, _ in self._parameters()], str(self.spec))
        self._allocate_missing([entry for entry in self._parameters() if entry[1].requires_grad])
        self._take_place()

    def _allocate_missing(self, parameters: Iterable[tuple[str, Tensor, dict[str, Any]]]) -> None:
        """State for those that have none; all of it or, where there is no room, none."""
        fresh: list[Tensor] = []
        try:
            for name, p, group in parameters:
                if not self.state[p]:
                    fresh.append(p)
                    self._allocate(name, p, group)
        except BaseException:
            for p in fresh:
                self.state.pop(p, None)
            raise

    def _take_place(self) -> None:
        """State was made or replaced other than by a step: allocate what stepping it needs, and make it survive."""
        if not self.homes.elsewhere:
            return
        held = {name: (self.homes.held(name, group, self._rows(p), dtype_name(p)), p.device)
                for name, p, group in self._parameters() if self.state.get(p)}  # fmt: skip
        self.homes.prepare(held)
        self._commit()

    def _commit(self) -> None:
        if self.homes.elsewhere:
            self.homes.commit({name: self.state[p] for name, p, _ in self._parameters() if self.state.get(p)})

    def close(self) -> None:
        """Give back what other optimizers may want: the directory of ``@disk``, threads. State can still be read."""
        self.homes.close()

    def _lines(self, name: str, p: Tensor, group: Mapping[str, Any]) -> list[Line]:
        where = str(p.device)
        return state_lines(self.spec, group, name, self._rows(p), where, dtype_name(p), self.capturable)

    def _allocate(self, name: str, p: Tensor, group: Mapping[str, Any], *, fresh: bool = False) -> dict[str, Tensor]:
        """State from the ledger's lines: what an earlier process left unless ``fresh``, else zeros."""
        check_slab(self.spec, group, name, self._rows(p), p)
        step, *lines = self._lines(name, p, group)
        home = self.homes.of(name)
        tensors, count = (None if fresh else home.survivor(name, lines)) or (home.allocate(name, lines, p.device), 0.0)
        self.state[p] = {step.key: torch.full((), count, dtype=torch.float32, device=step.location), **tensors}
        return self.state[p]

    def _to_overwrite(self, name: str, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """State that may be written over, none of its values being wanted any more."""
        there = self.state[p] if self.homes.of(name).rewritable else None
        return there or self._allocate(name, p, group, fresh=True)

    def ledger(self) -> Ledger:
        """What the state costs now, read from the live tensors; parameters that have not stepped have none."""
        lines = []
        for name, p, _ in self._parameters():
            placement = self.homes.of(name).placement
            for key, tensor in self.state.get(p, {}).items():
                moment, _, part = key.partition(".")
                where = str(tensor.device) if key == "step" else placement.location(str(p.device))
                nbytes = tensor.numel() * tensor.element_size()
                lines.append(Line(name, moment, part, dtype_name(tensor), tuple(tensor.shape), nbytes, where))
        return Ledger([*lines, *self.engine.shared_lines(self.spec, lines), *self.homes.workspace()])

    # The step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; ``closure`` re-evaluates the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.release is not None and getattr(self, "grad_scale", None) is not None:
            raise RuntimeError("torch.amp.GradScaler cannot be used with released gradients: parameters step inside "
                               "backward(), before it has unscaled them, and this backward pass has stepped them "
                               "with scaled gradients. Train in bfloat16, which needs no scaler")  # fmt: skip
        if self._plan is not None and self._plan.refresh(self):  # the tensors of the last step, with new gradients
            if self.nonfinite == "propagate" or not self._stopped_by(self._plan.non_finite()):
                self._plan.step(self.seed)
            return loss
        check_replaced(self)
        ready = [(i, name, p, group) for i, (name, p, group) in enumerate(self._parameters()) if p.grad is not None]
        self.partition.admit([(name, p) for name, p, _ in self._parameters()], str(self.spec))
        gradients = [(name, self._local_gradient(name, p)) for _, name, p, _ in ready]
        if self.capturable:
            kernels.check_capturable(self, ready)
        if amp.stopped_by_scaler(self, gradients):
            return loss
        if self.nonfinite != "propagate":
            bad = self.partition.agree(non_finite(gradients), [p for _, _, p, _ in ready])
            if self._stopped_by(bad):
                return loss
        works = self._step_some(ready, [g for _, g in gradients])
        self._plan = kernels.make_plan(self, works)
        if self.release is not None:
            self.release.finish()
        self._commit()
        return loss

    def _step_some(
        self, ready: Sequence[tuple[int, str, Tensor, dict[str, Any]]], gradients: Sequence[Tensor]
    ) -> list[Work]:
        """Step these ``(place among all, name, parameter, group)`` with what is here of their gradients."""
        self.homes.check()
        self._allocate_missing([entry[1:] for entry in ready])
        works = [self._work(*entry, g) for entry, g in zip(ready, gradients, strict=True)]
        parameters = [p for _, _, p, _ in ready]

        def run(some: Sequence[Work]) -> None:
            self.engine.step(self.spec, some, self.partition, self.seed)

        for first, stop in self.partition.buckets(parameters):  # one travels while the next is stepped
            self.homes.step(works[first:stop], run)
            self.partition.publish(parameters[first:stop])
        self.partition.finish()
        return works

    def _local_gradient(self, name: str, p: Tensor) -> Tensor:
        """What is here of the gradient; of a replicated parameter the whole, whose NaN every rank must see."""
        g = check_gradient(name, p)
        return g if type(g) is Tensor else self.partition.local(p, self._rows(p), g)

    def _work(self, index: int, name: str, p: Tensor, group: dict[str, Any], g: Tensor) -> Work:
        state = self.state[p]
        state["step"] += 1
        rows, local, groups = self._rows(p), self.partition.local, self.partition.groups(p)
        mine = local(p, rows, g) if g is p.grad else g
        return Work(name, index, rows, local(p, rows, p), mine, state, int(state["step"]), group, groups)

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
            raise RuntimeError("capturable=True steps all parameters at once, in opt.step(); released gradients step "
                               "one by one inside backward(); use one of them")  # fmt: skip
        self.settle()
        if self.release is not None:
            self.release.remove()
        self.release = Release(self, model, max_norm)
        return self.release

    # Saving and loading ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch.optim's dictionary (plain tensors, this rank's rows; of sharded parameters DTensors, as
        torch.distributed.checkpoint takes them), and under ``"memopt"`` what is needed to tell whether it fits: spec,
        rank, world size and the seed of the stochastic rounding."""
        from memopt.partitions import as_dtensors

        as_dtensors.refuse_helpers(self)
        self.settle()
        packed = super().state_dict()
        return {
            **packed,
            "state": as_dtensors.wrapped(self, packed["state"]),
            "memopt": {
                "spec": str(self.spec),
                "rank": self.partition.rank,
                "world_size": self.partition.world_size,
                "seed": self.seed,
                "skipped_steps": self.skipped_steps,
            },
        }

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
        plan: LoadPlan = plan_load(self, state_dict)
        for (name, p, group), saved in plan.states:
            target = self._to_overwrite(name, p, {**group, **plan.hyper_of(group)})
            for key, tensor in target.items():
                tensor.copy_(torch.as_tensor(saved[key])) if key in saved else tensor.zero_()
        for p in plan.without_state:
            self.state.pop(p, None)
        for group, loaded in zip(self.param_groups, plan.groups, strict=True):
            group.update(loaded)
        self.seed = plan.metadata.get("seed", self.seed)
        self.skipped_steps = plan.metadata.get("skipped_steps", self.skipped_steps)
        self._take_place()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError("an optimizer with its own process_group cannot be pickled or copied; use state_dict()")
        if not self.homes.copyable:
            raise TypeError("an optimizer with a directory cannot be pickled or copied, two would write there; "
                            "use state_dict()")  # fmt: skip
        self.settle()
        ours = {name: getattr(self, name) for name in ("spec", "nonfinite", "seed", "capturable")}
        ours["_skipped"] = self.skipped_steps
        # pickle cannot carry torch's 8-bit floats: their bytes travel instead.
        state = {
            p: {k: t.view(torch.uint8) if t.is_floating_point() and t.itemsize == 1 else t for k, t in parts.items()}
            for p, parts in self.state.items()
        }
        return {**super().__getstate__(), "state": state, "memopt": ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        for name, value in state.pop("memopt", {}).items():
            setattr(self, name, value)
        super().__setstate__(state)
        self._configure()
        self._made_for = [tuple(p.shape) for g in self.param_groups for p in g["params"]]
        self._seen_ids = [id(p) for g in self.param_groups for p in g["params"]]
        # A copy of a tensor is ordinary memory: put it back where the placement says.
        copied = dict(self.state)
        self.state = defaultdict(dict)
        for name, p, group in self._parameters():
            if copied.get(p):
                target = self._allocate(name, p, group, fresh=True)
                for key, value in copied[p].items():
                    target[key].copy_(value.view(target[key].dtype))
        self._take_place()

    # Another spec ----------------------------------------------------------------------------------------------

    def convert_(self, spec: str | OptimSpec, *, fill: Mapping[str, Any] | None = None, **fields: Any) -> Conversion:
        """Change the spec in place, in the middle of training; schedulers, groups and references stay valid.

        Each moment is decoded and encoded again (copied where its encoding stays), one parameter at a time. Engine,
        overrides and hyperparameters stay unless ``fields`` says otherwise; a full :class:`OptimSpec` means what it
        says. ``fill`` says what stands in for a moment that was not kept: ``{"exp_avg": 0}``, or the name of another
        moment. Returns the relative error of every moment. Raises SpecError before anything changes, and RuntimeError
        where memory or disk gives out: then some parameters may be as the new spec says, and overrides say which.
        """
        from memopt.checkpoint.convert import convert_

        return convert_(self, spec, fill=fill, **fields)

    # Looking ---------------------------------------------------------------------------------------------------

    def explain(self) -> str:
        """What runs and where, and every place where that is not literally what the spec asked for."""
        from memopt.explain import explain

        return explain(self)

    def __repr__(self) -> str:
        count = sum(len(group["params"]) for group in self.param_groups)
        return f"memopt.Optimizer({self.spec!s}, {count} parameters, state {self.ledger().nbytes:,} bytes)"


def create(model_or_params: Any, spec: str | OptimSpec = "adamw", **keywords: Any) -> Optimizer:
    """The optimizer that ``spec`` describes, for a model, parameters, named parameters or param groups.

    Keywords are hyperparameters of the rule (``lr``, ``betas``, ``weight_decay``, …), fields of :class:`OptimSpec`
    (``engine``, ``overrides``) and of :class:`Optimizer` (``nonfinite``, ``seed``, ``process_group``); any other is an
    error. Raises SpecError (a ValueError) for values that are not allowed.

    >>> import torch, memopt
    >>> model = torch.nn.Linear(1024, 1024)
    >>> opt = memopt.create(model, "adamw-8bit", lr=2e-5, overrides={"bias": "32bit"})
    >>> model(torch.randn(2, 1024)).sum().backward(); opt.step()
    >>> opt.ledger().nbytes == memopt.price(model, "adamw-8bit").nbytes
    True
    """
    params = model_or_params.named_parameters() if isinstance(model_or_params, torch.nn.Module) else model_or_params
    return Optimizer(params, spec, **keywords)
