"""transformers' Trainer with ``/zero1``: the checkpoint that it writes on one rank has the rows of all."""

from __future__ import annotations

from typing import Any

from memopt.core.extras import require


def consolidate_callback() -> Any:
    """A ``TrainerCallback`` for ``Trainer(callbacks=[...])``: before a checkpoint is written, rank 0 gets all rows.

    Trainer asks the first rank alone for the optimizer's state, so that nothing can be collected then. Resuming needs
    nothing: on any number of ranks, each takes its rows of what was saved.

    Raises:
        ImportError: where transformers is not installed, with the line that installs it.
    """
    require("transformers", "consolidate_callback()")
    from transformers import TrainerCallback

    class Consolidate(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **others: Any) -> None:
            if control.should_save:
                while not hasattr(optimizer, "consolidate_state_dict"):
                    optimizer = optimizer.optimizer
                optimizer.consolidate_state_dict()

        on_epoch_end = on_step_end

    return Consolidate()
