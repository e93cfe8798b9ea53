"""The one ``torch.optim.Optimizer``: rule × format × placement × partition, chosen by a spec."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.core.hyperparameters import SpecError
from memopt.optim.gradient_policy import bounds_of
from memopt.optim.saving.saved_optimizer import SavedOptimizer
from memopt.spec import OptimSpec

if TYPE_CHECKING:
    from memopt.checkpoint.conversion.report import Conversion
    from memopt.training.optimizer_in_backward import Release


class Optimizer(SavedOptimizer):
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

    >>> import torch, memopt
    >>> opt = memopt.create(torch.nn.Linear(2, 2), "adamw-8bit", lr=2e-5)
    >>> isinstance(opt, torch.optim.Optimizer), str(opt.spec), opt.param_groups[0]["lr"]
    (True, 'adamw-8bit', 2e-05)
    """

    def release_gradients(self, model: torch.nn.Module, *, max_norm: float | None = None) -> Release:
        """Step each parameter inside ``backward()`` as soon as its gradient is there, and free the gradient.

        Keep the loop as it is: ``loss.backward(); opt.step(); opt.zero_grad()``. ``opt.step()`` ends the step (and
        steps parameters that have a gradient from elsewhere). Parameters are those of the plain step, and at most one
        gradient is there at a time. What needs all gradients at once is refused, or costs a second backward pass:
        with ``max_norm`` a step is ``loss.backward(retain_graph=True); loss.backward(); opt.step()``, the first of
        which only measures the norm. See ``docs/release.md`` for accumulation, NaN and Inf, GradScaler,
        DistributedDataParallel and FSDP2.

        Args:
            model: the module whose parameters these are.
            max_norm: the largest norm of all gradients together, > 0; larger ones are scaled down to it. Default None,
                no clipping and one backward pass.

        Returns:
            The :class:`~memopt.training.optimizer_in_backward.Release`, whose ``remove()`` ends it.

        Raises:
            RuntimeError: with the reason, for a model that it cannot work with (DataParallel, replicas on several
                ranks), with ``capturable`` and with ``max_grad_norm``.
            ValueError: for a parameter of the optimizer that is not the model's.
            SpecError: for a ``max_norm`` that is not a number > 0.

        >>> import torch, memopt
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = memopt.create(model, "adamw-8bit")
        >>> release = opt.release_gradients(model)
        >>> model(torch.ones(1, 2)).sum().backward(); opt.step()
        >>> model.weight.grad is None, float(opt.state[model.weight]["step"])
        (True, 1.0)
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
        self.synchronize()
        if self.release is not None:
            self.release.remove()
        self.release = Release(self.stepper, model, max_norm)
        self.store.register_params()
        return self.release

    def close(self) -> None:
        """Give back what others may want: the directory of ``@disk``, threads, the folders of checkpoints that this
        process has locked for it. State can still be read."""
        from memopt.checkpoint.io import lock

        self.placement_stores.close()
        lock.release(id(self))

    # Another spec ----------------------------------------------------------------------------------------------

    def convert_(self, spec: str | OptimSpec, *, fill: Mapping[str, Any] | None = None, **fields: Any) -> Conversion:
        """Change the spec in place, in the middle of training; schedulers, groups and references stay valid.

        Each moment is decoded and encoded again (copied where its encoding stays), one parameter at a time.

        Args:
            spec: the new one. Of a string, what it does not say stays: engine, overrides, hyperparameters; an
                :class:`OptimSpec` means what it says.
            fill: what stands in for a moment that was not kept: moment -> a number (``{"exp_avg": 0}``), or the name of
                another moment. Default none.
            fields: keywords of :func:`memopt.create` that belong to the spec: hyperparameters, overrides, options of
                placements, engine.

        Returns:
            A :class:`~memopt.checkpoint.conversion.report.Conversion`: the ``relative_error`` of every moment, what was
            dropped or filled.

        Raises:
            SpecError: before anything changes, for a spec or a value that is not allowed, and for a moment that was not
                kept and is not filled.
            RuntimeError: where memory or disk gives out: then some parameters may be as the new spec says. Overrides
                say which where formats and places change; else the same call goes on with the rest, and the optimizer
                does nothing before.

        >>> import torch, memopt
        >>> w = torch.nn.Parameter(torch.randn(256, 256))
        >>> opt = memopt.create([w], "adamw")
        >>> w.grad = torch.randn(256, 256); opt.step()
        >>> report = opt.convert_("adamw-8bit")
        >>> str(opt.spec), 0 < report.relative_error["exp_avg"] < 0.05
        ('adamw-8bit', True)
        """
        from memopt.checkpoint.conversion.in_place import convert_

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

        Rows that stay keep their codes bit for bit (vectors and narrow rows whose blocks are coded, and weights that
        become large enough to be coded or too small for it, are encoded again). A factored moment's column means become
        those of the rows that are left. The number of steps stays. ``p.grad`` is dropped.

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
