"""The one ``torch.optim.Optimizer``: rule × format × placement × partition, chosen by a spec."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import proxy

import torch
from torch import Tensor

from memopt.core.hyperparameters import SpecError, check_max_grad_norm
from memopt.core.integrity import Integrity
from memopt.core.ledger import Ledger
from memopt.engines import Engine
from memopt.optim.edits.group_checks import align_names, check_group, is_named, named_groups
from memopt.optim.edits.rule_groups import check_assigned, split
from memopt.optim.frameworks import warn_of_replacement
from memopt.optim.params import Params
from memopt.optim.setup import Setup
from memopt.optim.state_dict import dump, load, packed_bytes, restore_copied
from memopt.optim.state_dtensors import ON_EVERY_RANK, REPLICAS, asking_framework, refuse
from memopt.optim.state_store import StateStore
from memopt.optim.step import Scaler, Stepper, bounds_of
from memopt.partitions import Partition
from memopt.placements.stores.by_placement import PlacementStores
from memopt.placements.stores.common_commit import go_on_together
from memopt.rules import Rule
from memopt.spec import OptimSpec, parse

if TYPE_CHECKING:
    from memopt.checkpoint.conversion.report import Conversion
    from memopt.training.optimizer_in_backward import Release


def _of_setup() -> Any:
    """An attribute that stands in ``optimizer.setup``, under the same name."""
    return _OfSetup()


class _OfSetup:
    __slots__ = ("_name",)

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else getattr(instance.setup, self._name)

    def __set__(self, instance: Any, value: Any) -> None:
        setattr(instance.setup, self._name, value)


class Optimizer(torch.optim.Optimizer):
    """An ordinary optimizer whose state is what ``spec`` says. Made by :func:`memopt.create`.

    State keys are a moment's name (``exp_avg``) or name and part (``exp_avg.codes``), and ``step``, an fp32 number in
    host memory. State is made at a parameter's first step, or by :meth:`init_state`.

    ``nonfinite`` is the policy for NaN and Inf in gradients: ``"skip"`` leaves parameters, state and step counts as
    they were and counts the step in ``skipped_steps`` (a warning names the parameters the first time); ``"raise"``
    raises FloatingPointError before anything changes; ``"propagate"`` does not look, as torch.optim. Where kernels run
    beside the host (CUDA), a skipped step is counted when the next one begins or when ``skipped_steps`` or a state_dict
    is asked for: until then ``state[p]["step"]`` has counted it.

    ``kinds`` are what modules say of parameters, by name (:func:`memopt.core.param_kinds.kinds`): which of them are
    embeddings, heads or norms, to a spec whose rule steps hidden matrices. :func:`memopt.create` finds them in a model.

    ``capturable=True`` keeps ``step`` on the parameter's device, so that a step can be part of a CUDA graph; it needs
    kernels that run there for every parameter.
    """

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
    release: Release | None = _of_setup()
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
        from memopt.pricing.price import spec_fields

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
        self.placement_stores.expect(
            lambda: {one.layout.name: one.layout.lines(str(one.p.device))[1:] for one in self.params.resolved()}
        )
        warn_of_replacement()

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
        #: The state of all ranks, where it is here, from :meth:`consolidate_state_dict` to the next change.
        self._consolidated: tuple[dict[int, Any] | None] | None = None
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
        self._consolidated = None
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
        norm = self.stepper.norm
        return torch.tensor(norm) if isinstance(norm, float) else norm

    @property
    def skipped_steps(self) -> int:
        """Steps that did not happen because of NaN or Inf, or because torch.amp.GradScaler's scale was too large."""
        self.settle()
        plan = self.stepper.plan
        return self.stepper.skipped + (plan.skipped_on_device() if plan is not None else 0)

    @skipped_steps.setter
    def skipped_steps(self, count: int) -> None:
        self.stepper.skipped += count - self.skipped_steps

    def settle(self) -> None:
        """Take note of what became of the last step, where kernels run beside the host."""
        self.stepper.settle()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler hands over its scale instead of unscaling: to kernels, which undo it in
        registers, and where gradients are released, to be refused."""
        if self.release is not None:
            return True
        return self.nonfinite == "skip" and self.stepper.plan is not None

    def release_gradients(self, model: torch.nn.Module, *, max_norm: float | None = None) -> Release:
        """Step each parameter inside ``backward()`` as soon as its gradient is there, and free the gradient.

        Keep the loop as it is: ``loss.backward(); opt.step(); opt.zero_grad()``. ``opt.step()`` ends the step (and
        steps parameters that have a gradient from elsewhere). Parameters are those of the plain step, and at most one
        gradient is there at a time. What needs all gradients at once is refused, or costs a second backward pass:
        with ``max_norm`` a step is ``loss.backward(retain_graph=True); loss.backward(); opt.step()``, the first of
        which only measures the norm. See ``docs/release.md`` for accumulation, NaN and Inf, GradScaler,
        DistributedDataParallel and FSDP2.

        Returns the :class:`~memopt.training.optimizer_in_backward.Release`, whose ``remove()`` ends it. Raises
        RuntimeError with the reason for a model that it cannot work with.
        """
        from memopt.training.optimizer_in_backward import Release

        if max_norm is not None and not (isinstance(max_norm, (int, float)) and max_norm > 0):
            raise SpecError(f"max_norm={max_norm!r} is not allowed; it must be a number > 0, or None")
        if self.capturable:
            raise RuntimeError(
                "capturable=True steps all parameters at once, in opt.step(); released gradients step "
                "one by one inside backward(); use one of them"
            )
        if bounds_of(self.param_groups) is not None:
            raise RuntimeError(
                "max_grad_norm needs the norm of all gradients before the first parameter steps, and here they step "
                "one by one: set opt.max_grad_norm = None and use release_gradients(model, max_norm=…), which "
                "takes the norm in a backward pass of its own"
            )
        self.setup.check_whole()
        self.settle()
        if self.release is not None:
            self.release.remove()
        self.release = Release(self.stepper, model, max_norm)
        self.store.watch()
        return self.release

    # Groups and state ------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's; a hyperparameter that the rule does not have, or a value that is not allowed,
        and a parameter that is already there raise an error and leave the optimizer as it was."""
        self._consolidated = None
        self.setup.check_whole()
        if self.partition.is_flattened:
            raise RuntimeError("DeepSpeed has taken the parameters of this optimizer; no group can be added")
        seen = {id(p) for g in self.param_groups for p in g["params"]}
        groups = [check_group(group, self.spec, seen) for group in split(param_group, self.spec, self.kinds)]
        for group in groups:
            align_names(group, self.param_groups)
            super().add_param_group(group)
        self.params.remember(edited=True)
        self.store.watch()

    def init_state(self, *, anew: bool = False) -> None:
        """Allocate the state of every parameter that requires a gradient and has none; zeros, as before the first step.
        Those of lazy modules that have no shape yet get theirs at their first step.

        Args:
            anew: forget the state that is there, too, and begin again: moments are zero and no step has been taken.
                Ends the refusals that follow a step, a load or a conversion which stopped in the middle.
        """
        self._consolidated = None
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

    def close(self) -> None:
        """Give back what others may want: the directory of ``@disk``, threads, the folders of checkpoints that this
        process has locked for it. State can still be read."""
        from memopt.checkpoint.io import lock

        self.placement_stores.close()
        lock.release(id(self))

    # Saving and loading ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch.optim's dictionary (plain tensors, this rank's rows; of sharded parameters DTensors, as
        torch.distributed.checkpoint takes them), and under ``"memopt"`` what is needed to tell whether it fits: spec,
        rank, world size and the seed of the stochastic rounding. Hooks see all of it, and what they return is what is
        returned; state under a key that is no parameter goes along."""
        asking = asking_framework(self.spec, self.partition)
        if asking in ON_EVERY_RANK:
            self.consolidate_state_dict()
        elif asking is not None and (not self._consolidated or asking in REPLICAS):
            refuse(self.spec, asking)
        self.setup.check_whole()
        self.settle()
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        with self.partition.shown(self):
            self.store.check_all()
            found = dump(self.params, self.skipped_steps, self._consolidated[0] if self._consolidated else None)
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, found)
            found = found if replaced is None else replaced
        return found

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Under ``/zero1``, collect the state of all ranks for the next ``state_dict()`` on rank ``to``, which then is
        what one process would have: the method of ``torch.distributed.optim.ZeroRedundancyOptimizer``. Elsewhere it
        does nothing. Every rank must call it.

        What was collected holds until the optimizer steps or its state changes otherwise. It is loaded by
        :meth:`load_state_dict` on any number of ranks, each of which takes its rows.

        Args:
            to: the rank in the optimizer's process group whose host memory takes all of the state; None for every
                rank's.
        """
        if self.spec.partition != "zero1" or self.partition.world_size == 1:
            return
        from memopt.checkpoint.consolidate import consolidated

        if to is not None and not 0 <= to < self.partition.world_size:
            raise ValueError(
                f"to={to!r} is not allowed; it is a rank from 0 to {self.partition.world_size - 1}, or None"
            )
        self.setup.check_whole()
        self.settle()
        self.store.check_all()
        self._consolidated = (consolidated(self, to),)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` of this or of another optimizer returned: of memopt under any spec, torch.optim,
        transformers' Adafactor, bitsandbytes, torchao, flashoptim.

        State of the same spec is copied. Other state is converted, and one warning says what was lost of each moment;
        ``create(..., on_mismatch="refuse")`` raises instead. So a run goes on after its spec was changed inside a
        framework that resumes by this method (``Trainer``, accelerate, Lightning). Everything is checked before
        anything is changed. State goes where the placement says and keeps its dtype (torch.optim's own method casts
        it to the parameter's).

        Args:
            state_dict: as ``torch.optim.Optimizer.state_dict()`` has it: ``state`` and ``param_groups``, with the same
                parameters in the same groups as here.

        Raises:
            ValueError: with the parameter and the key that do not fit.
            SpecError: (a ValueError) for a moment that was not saved; ``memopt.load(..., fill=...)`` makes one up.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        self._consolidated = None
        self.store.notice_replaced()
        with self.partition.shown(self):
            metadata = load(self.store, state_dict, self._load_other)
        self.skipped_steps = metadata.get("skipped_steps", self.skipped_steps)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _load_other(self, state_dict: Mapping[str, Any]) -> None:
        from memopt.checkpoint.load_dict import load_other

        load_other(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        self.setup.check_whole()
        if self.process_group is not None:
            raise TypeError("an optimizer with its own process_group cannot be pickled or copied; use state_dict()")
        if self.partition.is_flattened:
            raise TypeError(
                "an optimizer of DeepSpeed's vectors cannot be pickled or copied; use the engine's save_checkpoint"
            )
        if not self.placement_stores.copyable:
            raise TypeError(
                "an optimizer with a directory cannot be pickled or copied, two would write there; use state_dict()"
            )
        self.settle()
        self.store.check_all()
        ours = {
            name: getattr(self, name)
            for name in ("spec", "nonfinite", "seed", "capturable", "on_mismatch", "skipped_steps")
        }
        state = {p: packed_bytes(x) if isinstance(x, dict) else x for p, x in self.state.items()}
        return {**super().__getstate__(), "state": state, "memopt": {**ours, "kinds": self.kinds}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        ours = state.pop("memopt", None)
        if ours is not None:
            skipped = ours.pop("skipped_steps")
            self.kinds = ours.pop("kinds", {})
            self._make(Setup(ours.pop("spec"), **ours))
            self.stepper.skipped = skipped
        super().__setstate__(state)
        copied = dict(self.state)
        self.state = defaultdict(dict)
        self.params.remember()
        restore_copied(self.store, copied)

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
        from memopt.checkpoint.conversion.in_place import convert_

        self._consolidated = None
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
            RuntimeError: for sharded parameters without an ``into`` that is sharded likewise, and while gradients are
                released. Every rank must call this.

        Example::

            keep = model.embed.weight.norm(dim=1) > 0.1
            opt.select_rows(model.embed.weight, keep)
        """
        from memopt.training.state_rows import select_rows

        self._consolidated = None
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
        from memopt.training.state_rows import append_rows

        self._consolidated = None
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
        from memopt.training.state_rows import reset_state

        self._consolidated = None
        reset_state(self, parameters, moments, rows, step)

    # Looking ---------------------------------------------------------------------------------------------------

    def explain(self) -> str:
        """What runs and where, and every place where that is not literally what the spec asked for.

        Returns:
            Lines of a label and a sentence.

        >>> import torch, memopt
        >>> opt = memopt.create([torch.nn.Parameter(torch.zeros(8))], "adamw-8bit", max_grad_norm=1.0)
        >>> [line.split()[0] for line in opt.explain().splitlines()][:4]
        ['spec', 'rule', 'format', 'engine']
        """
        from memopt.diagnosis.explain import explain

        self.setup.check_whole()
        return explain(self)

    def __repr__(self) -> str:
        count = sum(len(group["params"]) for group in self.param_groups)
        return f"memopt.Optimizer({self.spec!s}, {count} parameters, state {self.ledger().nbytes:,} bytes)"
