"""transformers' Trainer: with ``/zero1`` the checkpoint that it writes on one rank has the rows of all, and an
optimizer that it makes in the place of ours is said."""

from __future__ import annotations

from typing import Any

from memopt.core.extras import require


def consolidate_callback() -> Any:
    """A ``TrainerCallback`` for ``Trainer(callbacks=[...])``: before a checkpoint is written, rank 0 gets all rows.

    Trainer asks the first rank alone for the optimizer's state, so that nothing can be collected then. Resuming needs
    nothing: on any number of ranks, each takes its rows of what was saved.

    Training does not begin with another optimizer than memopt's, as Trainer makes it without a word where its DeepSpeed
    file has an ``"optimizer"`` section: a RuntimeError names what is stepped and the keys to change.

    Raises:
        ImportError: where transformers is not installed, with the line that installs it.
    """
    require("transformers", "consolidate_callback()")
    from transformers import TrainerCallback

    class Consolidate(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **others: Any) -> None:
            _refuse_other(optimizer)

        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **others: Any) -> None:
            if control.should_save:
                while not hasattr(optimizer, "consolidate_state_dict"):
                    optimizer = optimizer.optimizer
                optimizer.consolidate_state_dict()

        on_epoch_end = on_step_end

    return Consolidate()


def _refuse_other(optimizer: Any) -> None:
    from memopt.optimizer import Optimizer

    found = optimizer
    while found is not None and not isinstance(found, Optimizer):
        if not hasattr(found, "optimizer"):
            raise RuntimeError(
                f"Trainer steps {type(found).__name__} and no memopt.Optimizer. If its DeepSpeed file has an "
                '"optimizer" section (memopt doctor --deepspeed FILE says whether), take that and "scheduler" out '
                'and add "zero_force_ds_cpu_optimizer": false and '
                '"zero_allow_untested_optimizer": true (memopt.deepspeed_config writes both); else give Trainer '
                'optimizer_cls_and_kwargs=(memopt.Optimizer, {"spec": …})'
            )
        found = found.optimizer
