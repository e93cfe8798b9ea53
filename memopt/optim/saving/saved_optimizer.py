"""An optimizer that is saved, loaded, copied and pickled, as torch.optim's are."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from memopt.optim.saving.dtensors import ON_EVERY_RANK, REPLICAS, asking_framework, refuse
from memopt.optim.saving.pickling import packed_bytes, restore_copied
from memopt.optim.saving.state_dict import dump
from memopt.optim.setup import Setup
from memopt.optim.stepping_optimizer import SteppingOptimizer


class SavedOptimizer(SteppingOptimizer):
    """``state_dict()`` and what goes with it."""

    def state_dict(self) -> dict[str, Any]:
        """torch.optim's dictionary (plain tensors, this rank's rows; of sharded parameters DTensors, as
        torch.distributed.checkpoint takes them), and under ``"memopt"`` what is needed to tell whether it fits: spec,
        rank, world size and the seed of the stochastic rounding. Hooks see all of it, and what they return is what is
        returned; state under a key that is no parameter goes along.

        Returns:
            ``{"state": …, "param_groups": …, "memopt": …}``; the tensors are the optimizer's own, not copies.

        Raises:
            RuntimeError: where a step or a conversion stopped in the middle, and under ``/zero1`` where a framework
                asks that would keep one rank's rows for all.

        >>> import torch, memopt
        >>> opt = memopt.create([torch.nn.Parameter(torch.zeros(2))], "adamw-8bit")
        >>> opt.init_state(); sorted(opt.state_dict()["state"][0])
        ['exp_avg', 'exp_avg_sq', 'step']
        """
        asking = asking_framework(self.spec, self.partition)
        if asking in ON_EVERY_RANK:
            self.consolidate_state_dict()
        elif asking is not None and (not self.integrity.snapshot or asking in REPLICAS):
            refuse(self.spec, asking)
        self.setup.check_whole()
        self.synchronize()
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        with self.partition.logical_params(self):
            self.store.check_all()
            found = dump(self.params, self.skipped_steps, *self.integrity.snapshot)
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
                rank's. Default 0.

        Raises:
            ValueError: for a rank that there is not.
        """
        if self.spec.partition != "zero1" or self.partition.world_size == 1:
            return
        from memopt.checkpoint.consolidate import consolidated

        if to is not None and not 0 <= to < self.partition.world_size:
            raise ValueError(
                f"to={to!r} is not allowed; it is a rank from 0 to {self.partition.world_size - 1}, or None"
            )
        self.setup.check_whole()
        self.synchronize()
        self.store.check_all()
        self.integrity.snapshot = (consolidated(self, to),)

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

        >>> import torch, memopt
        >>> w = torch.nn.Parameter(torch.ones(2)); theirs = torch.optim.AdamW([w])
        >>> w.grad = torch.ones(2); theirs.step()
        >>> opt = memopt.create([w], "adamw"); opt.load_state_dict(theirs.state_dict())
        >>> float(opt.state[w]["step"])
        1.0
        """
        from memopt.checkpoint.load_dict import load_dict

        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        self.store.notice_replaced()
        with self.partition.logical_params(self):
            load_dict(self, state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

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
        self.synchronize()
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
            self.stepper.gradients.skipped = skipped
        super().__setstate__(state)
        copied = dict(self.state)
        self.state = defaultdict(dict)
        self.params.remember()
        restore_copied(self.store, copied)
