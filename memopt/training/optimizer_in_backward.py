"""Gradient release: parameters step inside ``backward()``, each as soon as its gradient is there, and free it."""

from __future__ import annotations

import threading
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memopt.core.user_warning import warn
from memopt.layout.steppable import STEPPED
from memopt.placements.gradients.checks import check_gradient, clip_factor, non_finite
from memopt.training.clip import PartialNorm

if TYPE_CHECKING:
    from memopt.optim.layouts import NumberedParam
    from memopt.optim.step import Stepper


class Release:
    """The hooks of :meth:`memopt.Optimizer.release_gradients`; :meth:`remove` takes them away.

    Between two calls of ``optimizer.step()`` every parameter's gradient comes once: it steps, and is freed. With
    ``max_norm`` it comes twice: the first backward pass adds up the norm, the second scales by it and steps.
    """

    def __init__(self, stepper: Stepper, model: nn.Module, max_norm: float | None) -> None:
        _refuse_model(model)
        of_model = {id(p) for p in model.parameters()}
        for name, p, _ in stepper.params.entries():
            if id(p) not in of_model:
                raise ValueError(
                    f"{name} of shape {tuple(p.shape)} is not a parameter of the model; create the "
                    "optimizer after the model is moved, wrapped or sharded"
                )
            _refuse_replica(name, p)
        self.max_norm = max_norm
        #: The norm of all gradients of the last step, as a number; None without ``max_norm``.
        self.norm: float | None = None
        self._stepper, self._setup = stepper, stepper.setup
        self._lock = threading.RLock()  # autograd runs the hooks of several devices in several threads
        self._begin()
        self._hooks: dict[Tensor, Any] = {}
        self._entries: dict[int, tuple[int, str, dict[str, Any]]] = {}
        self.follow()

    def follow(self) -> None:
        """Release the gradients of all parameters that the optimizer has now, of those that are frozen from the moment
        at which they are not."""
        for _, p, _ in self._stepper.params.entries():
            if p not in self._hooks and p.dtype in STEPPED:
                frozen = not p.requires_grad
                try:
                    p.requires_grad_(True)  # a frozen one takes no hook, and keeps the one it has
                    self._hooks[p] = p.register_post_accumulate_grad_hook(self._arrived)
                finally:
                    if frozen:
                        p.requires_grad_(False)
        self._entries = {}

    def _begin(self) -> None:
        """Nothing of the next step is known yet."""
        self._entries = {}
        self._passes: dict[int, int] = {}  # by identity of the parameter: how often its gradient has come
        self._partial = PartialNorm()
        self._skipped: list[str] = []

    def remove(self) -> None:
        """Back to gradients that stay until ``optimizer.step()``."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        if self._setup.release is self:
            self._setup.release = None
            self._stepper.store.register_params()
            self._setup.placement_stores.synchronize()

    def covers(self, p: Tensor) -> bool:
        return p in self._hooks

    def end_step(self, counted: bool = False) -> None:
        """The end of a step; called by ``optimizer.step()``. ``counted``: it was skipped for a gradient that was not
        released, and has been counted as skipped."""
        try:
            self._setup.placement_stores.synchronize()  # what steps beside backward() has stepped
        except BaseException:
            self._begin()
            raise
        once = [self._entries[i][1] for i, count in self._passes.items() if self.max_norm is not None and count == 1]
        skipped = self._skipped
        self._begin()
        if once:
            raise RuntimeError(
                f"max_norm={self.max_norm!r} needs two backward passes for each step, "
                "loss.backward(retain_graph=True) and loss.backward(); nothing was changed, and "
                f"the gradient of {once[0]} came once"
            )
        if skipped and not counted:
            self._stepper.gradients.skipped += 1

    def give_up(self) -> None:
        """The step has failed: the next backward pass begins another."""
        self._begin()

    @torch.no_grad()
    def _arrived(self, p: Tensor) -> None:
        with self._lock:
            if id(p) not in self._entries:
                found = enumerate(self._stepper.params.entries())
                self._entries = {id(q): (i, name, group) for i, (name, q, group) in found}
            if id(p) not in self._entries:  # not the optimizer's any more
                return
            try:
                self._take(p)
            except BaseException:
                self._begin()
                raise
            finally:
                p.grad = None

    def _take(self, p: Tensor) -> None:
        name = self._entries[id(p)][1]
        check_gradient(name, p)
        _refuse_replica(name, p)
        self._setup.partition.validate_params([(name, p)], str(self._setup.spec))
        count = self._passes[id(p)] = self._passes.get(id(p), 0) + 1
        passes = 1 if self.max_norm is None else 2
        if count > passes:
            raise RuntimeError(
                f"the gradient of {name} came again before optimizer.step(): released gradients are not there to be "
                "added to. Accumulation over micro-batches (and a parameter in several checkpointed segments with "
                "use_reentrant=True) needs them; otherwise call optimizer.step() after every backward pass"
            )
        if count < passes:
            assert p.grad is not None
            self._partial.add(p.grad)
        else:
            self._step(p, name)

    def _step(self, p: Tensor, name: str) -> None:
        setup, stepper = self._setup, self._stepper
        assert p.grad is not None
        scale = 1.0
        if self.max_norm is not None:
            if self._partial.pending:
                self.norm = float(self._partial.total())
            assert self.norm is not None
            if not isfinite(self.norm) and setup.nonfinite != "propagate":
                self._stop(name, "the norm of all gradients is not finite, and nothing was changed")
                return
            scale = clip_factor(self.norm, self.max_norm)
        index, name, group = self._entries[id(p)]
        entry = index, name, p, group
        step = partial(self._step_those, scale)
        if not setup.placement_stores.of(name).submit_step(name, p, entry, step):
            [layout] = stepper.params.layouts_of([entry])
            step([(entry, stepper.own(layout, p, stepper.local_gradient(layout, p)))])

    @torch.no_grad()
    def _step_those(self, scale: float, ready: list[tuple[NumberedParam, Tensor]]) -> None:
        """Step parameters with these gradients times ``scale``, which is that of the whole backward pass: one, or in
        another thread and later than ``_step`` perhaps several."""
        setup, stepper = self._setup, self._stepper
        if self.max_norm is None and setup.nonfinite != "propagate":
            found = non_finite([(entry[1], gradient) for entry, gradient in ready])
            bad = set(setup.partition.any_rank(found, [entry[2] for entry, _ in ready]))
            for name in sorted(bad):
                self._stop(name, "it and what comes after it in this backward pass is as it was; others have stepped")
            ready = [(entry, gradient) for entry, gradient in ready if entry[1] not in bad]
        if ready:
            entries, gradients = zip(*ready, strict=True)
            scales = {} if scale == 1 else {id(group): scale for _, _, _, group in entries}
            stepper.step_some(stepper.check(entries, gradients), scales)

    def _stop(self, name: str, what: str) -> None:
        if self._setup.nonfinite == "raise":
            raise FloatingPointError(f"NaN or Inf in the gradient of {name}: {what}")
        if not self._skipped and not self._stepper.gradients.skipped:
            scope = "no parameter was stepped" if self.max_norm is not None else "it was not stepped, others were"
            warn(
                f"NaN or Inf in the gradient of {name}: {scope}. Later skips are only counted, in "
                "optimizer.skipped_steps."
            )
        self._skipped.append(name)

    def explain(self) -> str:
        """One sentence: what happens in ``backward()``."""
        clip = "" if self.max_norm is None else f", clipped to a norm of {self.max_norm} by a first pass"
        count = sum(p.requires_grad for p in self._hooks)
        return f"released: {count} parameters step inside backward(){clip}"


def _refuse_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"release_gradients takes the model, not a {type(model).__name__}")
    for kind in (nn.parallel.DistributedDataParallel, nn.DataParallel, *_fsdp1()):
        if any(isinstance(module, kind) for module in model.modules()):
            raise RuntimeError(
                f"gradients cannot be released under {kind.__name__}: it averages them over the ranks "
                "after the hook in which a parameter would step; shard with "
                "torch.distributed.fsdp.fully_shard, which averages before"
            )


def _fsdp1() -> tuple[type, ...]:
    if not torch.distributed.is_available():
        return ()
    from torch.distributed.fsdp import FullyShardedDataParallel

    return (FullyShardedDataParallel,)


def _refuse_replica(name: str, p: Tensor) -> None:
    """A parameter that several processes hold whole has a gradient that nobody averages inside ``backward()``."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    from torch.distributed.tensor import DTensor

    if not isinstance(p, DTensor):
        raise RuntimeError(
            f"{name} is whole on each of {dist.get_world_size()} ranks, and its gradient is this rank's "
            "alone when it is ready; gradients are released in one process, or sharded with "
            "torch.distributed.fsdp.fully_shard"
        )
