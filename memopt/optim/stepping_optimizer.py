"""An optimizer that steps: its parts, its parameters and groups, and the state they have."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import proxy

import torch
from torch import Tensor

from memopt.core.hyperparameters import check_max_grad_norm
from memopt.core.integrity import Integrity
from memopt.core.ledger import Ledger
from memopt.engines import Engine
from memopt.optim.edits.group_checks import align_names, check_group, is_named, named_groups
from memopt.optim.edits.rule_groups import check_assigned, check_blocks, split
from memopt.optim.frameworks import warn_of_arguments, warn_of_replacement
from memopt.optim.gradient_policy import Scaler
from memopt.optim.params import Params
from memopt.optim.setup import Releasing, Setup
from memopt.optim.state_store import StateStore
from memopt.optim.step import Stepper
from memopt.partitions import Partition
from memopt.placements.stores.by_placement import PlacementStores
from memopt.placements.stores.common_commit import go_on_together
from memopt.pricing.price import spec_fields
from memopt.rules import Rule
from memopt.spec import OptimSpec, parse


def _of_setup() -> Any:
    """An attribute that stands in ``optimizer.setup``, under the same name."""
    return _OfSetup()


def untraced(method: Callable[..., None]) -> Callable[..., None]:
    """A method that torch keeps its compiler's tracer out of, for which it imports the compiler: one to two seconds at
    the first call. Where that was not imported nothing is traced, and the method itself will do."""
    plain: Callable[..., None] = getattr(method, "__wrapped__", method)
    return method if "torch._dynamo" in sys.modules else plain


class _OfSetup:
    __slots__ = ("_name",)

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else getattr(instance.setup, self._name)

    def __set__(self, instance: Any, value: Any) -> None:
        setattr(instance.setup, self._name, value)


class SteppingOptimizer(torch.optim.Optimizer):
    """What :class:`memopt.Optimizer` is before it is saved, loaded and converted: a setup, its parameters, a store of
    their state, and the step."""

    spec: OptimSpec = _of_setup()
    rule: Rule = _of_setup()
    engine: Engine = _of_setup()
    partition: Partition = _of_setup()
    placement_stores: PlacementStores = _of_setup()
    integrity: Integrity = _of_setup()
    process_group: Any = _of_setup()
    nonfinite: str = _of_setup()
    seed: int = _of_setup()
    capturable: bool = _of_setup()
    on_mismatch: str = _of_setup()
    release: Releasing | None = _of_setup()
    unfinished: Any = _of_setup()

    def __init__(
        self,
        params: Iterable[Any],
        spec: str | OptimSpec,
        *,
        nonfinite: str = "skip",
        seed: int = 0,
        process_group: Any = None,
        capturable: bool = False,
        on_mismatch: str = "convert",
        max_grad_norm: float | None = None,
        kinds: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> None:
        spec = parse(spec, **spec_fields(fields))
        self._make(
            Setup(
                spec,
                nonfinite=nonfinite,
                seed=seed,
                capturable=capturable,
                process_group=process_group,
                on_mismatch=on_mismatch,
            ),
        )
        check_max_grad_norm(max_grad_norm, spec.engine)
        clip = {} if max_grad_norm is None else {"max_grad_norm": max_grad_norm}
        self.kinds = dict(kinds or {})
        super().__init__(named_groups(params), {**spec.resolve(), **clip})
        self.spec = self.placement_stores.spec = spec.for_names([name for name, _, _ in self.params.entries()])
        if spec.is_mixed:
            check_assigned(list(self.params.entries()), self.spec, self.kinds, is_named(self.param_groups))
        self._go_on_together()
        self.placement_stores.validate_existing(
            lambda: {one.layout.name: one.layout.lines(str(one.p.device))[1:] for one in self.params.resolved()}
        )
        warn_of_replacement()
        warn_of_arguments({*fields, *spec.hyper, *fields.get("hyper", ())}, spec.resolve())

    def _go_on_together(self) -> None:
        """Ranks that an earlier run left at different commits."""
        if self.placement_stores.durable is not None and self.partition.world_size > 1:
            try:
                go_on_together(self.placement_stores, self.partition, self.process_group)
            except BaseException:
                self.placement_stores.close()
                raise

    def _make(self, setup: Setup) -> None:
        """The collaborators. They know the optimizer as torch.optim does, weakly: it is freed with the last reference
        to it, without waiting for the garbage collector."""
        self.setup = setup
        self.params = Params(setup, proxy(self))
        self.store = StateStore(self.params)
        self.stepper = Stepper(self.store)

    # The step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: re-evaluates the loss, with gradients enabled, and returns it. Default None.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            FloatingPointError: for NaN or Inf in a gradient with ``nonfinite="raise"``; nothing was changed.
            RuntimeError: for a gradient or a state that does not fit its parameter, and after a step or a conversion
                that stopped in the middle.
            SpecError: for a hyperparameter in a group that was set to what means nothing.

        >>> import torch, memopt
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt = memopt.create([w], "sgd", lr=0.5)
        >>> w.grad = torch.ones(2)
        >>> opt.step(); w.data
        tensor([0.5000, 0.5000])
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scaler = Scaler(getattr(self, "found_inf", None), getattr(self, "grad_scale", None))
        if scaler.grad_scale is not None and self.release is not None:
            raise RuntimeError(
                "torch.amp.GradScaler cannot be used with released gradients: parameters step inside "
                "backward(), before it has unscaled them, and this backward pass has stepped them "
                "with scaled gradients. Train in bfloat16, which needs no scaler"
            )
        self.stepper.step(scaler)
        return loss

    @property
    def max_grad_norm(self) -> Any:
        """The largest norm of all gradients together that a step takes as it is; larger ones are scaled down to it
        inside the step, and ``p.grad`` stays as it is. None: nothing is clipped.

        It stands in each group as ``group["max_grad_norm"]``, where a schedule may change it as it does ``lr``; a group
        whose own is None or smaller is scaled by its own, of the same norm. Reading it gives one number, or where
        groups have different ones a tuple; setting it sets all groups. ``math.inf`` measures :attr:`grad_norm` and
        clips nothing.

        >>> import torch, memopt
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> opt = memopt.create([w], "sgd", lr=1.0, max_grad_norm=1.0)
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> opt.step(); opt.grad_norm, w.data, w.grad
        (tensor(5.), tensor([-0.6000, -0.8000]), tensor([3., 4.]))
        """
        bounds = [group.get("max_grad_norm") for group in self.param_groups]
        return bounds[0] if all(bound == bounds[0] for bound in bounds) else tuple(bounds)

    @max_grad_norm.setter
    def max_grad_norm(self, bound: float | None) -> None:
        check_max_grad_norm(bound, self.spec.engine)
        self.defaults["max_grad_norm"] = bound
        for group in self.param_groups:
            group["max_grad_norm"] = bound

    @property
    def grad_norm(self) -> Tensor | None:
        """The 2-norm of all gradients of the last step together, before clipping, fp32 []: for a log. NaN or infinite
        where that was the reason to skip the step. None without :attr:`max_grad_norm`, and before the first step."""
        norm = self.stepper.gradients.norm
        return torch.tensor(norm) if isinstance(norm, float) else norm

    @property
    def skipped_steps(self) -> int:
        """Steps that did not happen because of NaN or Inf, or because torch.amp.GradScaler's scale was too large."""
        self.synchronize()
        plan = self.stepper.plan
        return self.stepper.gradients.skipped + (plan.skipped_on_device() if plan is not None else 0)

    @skipped_steps.setter
    def skipped_steps(self, count: int) -> None:
        self.stepper.gradients.skipped += count - self.skipped_steps

    def synchronize(self) -> None:
        """Take note of what became of the last step, where kernels run beside the host."""
        self.stepper.synchronize()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler hands over its scale instead of unscaling: to kernels, which undo it in
        registers, and where gradients are released, to be refused."""
        if self.release is not None:
            return True
        return self.nonfinite == "skip" and self.stepper.plan is not None

    # Groups and state ------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """One more param group, as torch.optim.Optimizer's. Where the spec has several rules, its parameters go to a
        group of each.

        Args:
            param_group: ``"params"``, and hyperparameters that differ from the optimizer's.

        Raises:
            SpecError: for a hyperparameter that the rule does not have, or a value that is not allowed.
            ValueError: for a parameter that is already there.
            RuntimeError: where DeepSpeed has taken the parameters. The optimizer is as it was in all cases.

        >>> import torch, memopt
        >>> opt = memopt.create([torch.nn.Parameter(torch.zeros(2))], "adamw-8bit")
        >>> opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))], "lr": 1e-4})
        >>> [group["lr"] for group in opt.param_groups]
        [0.001, 0.0001]
        """
        self.setup.check_whole()
        if self.partition.is_flattened:
            raise RuntimeError("DeepSpeed has taken the parameters of this optimizer; no group can be added")
        seen = {id(p) for g in self.param_groups for p in g["params"]}
        groups = [check_group(group, self.spec, seen) for group in split(param_group, self.spec, self.kinds)]
        for group in groups:
            check_blocks(group)
        for group in groups:
            align_names(group, self.param_groups)
            own = {*group, "max_grad_norm"}
            untraced(torch.optim.Optimizer.add_param_group)(self, group)
            for key in self.defaults.keys() - own:  # hyperparameters of another rule of the spec
                group.pop(key, None)
        self.params.remember(edited=True)
        self.store.register_params()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim.Optimizer's.

        Args:
            set_to_none: drop the gradients rather than fill them with zeros.
        """
        untraced(torch.optim.Optimizer.zero_grad)(self, set_to_none)

    def init_state(self, *, anew: bool = False) -> None:
        """Allocate the state of every parameter that requires a gradient and has none; zeros, as before the first step.
        Those of lazy modules that have no shape yet get theirs at their first step.

        Args:
            anew: forget the state that is there, too, and begin again: moments are zero and no step has been taken.
                Ends the refusals that follow a step, a load or a conversion which stopped in the middle.
        """
        self.store.init(anew)

    def ledger(self) -> Ledger:
        """What the state costs now, read from the live tensors; parameters that have not stepped have none. Tensors
        that the user has put beside the state are in it.

        Returns:
            A :class:`memopt.Ledger`, one line for each tensor; ``nbytes`` is their sum in bytes.

        >>> import torch, memopt
        >>> opt = memopt.create([torch.nn.Parameter(torch.zeros(256, 256))], "adamw-8bit")
        >>> opt.ledger().nbytes
        0
        >>> opt.init_state(); opt.ledger().nbytes
        133124
        """
        return self.store.ledger()
