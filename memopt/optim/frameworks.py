"""What a framework that is already set up would do with an optimizer that is made now."""

from __future__ import annotations

import sys
import warnings


def warn_of_replacement() -> None:
    """Warn where accelerate (or transformers' Trainer, by accelerate) puts DeepSpeed's CPU Adam in the place of every
    optimizer that it prepares: it does so without a word when the DeepSpeed configuration offloads the optimizer.

    What was loaded is looked at; nothing is imported.
    """
    state = sys.modules.get("accelerate.state")
    shared = getattr(getattr(state, "AcceleratorState", None), "_shared_state", None) or {}
    plugins = shared.get("deepspeed_plugins")
    for plugin in plugins.values() if isinstance(plugins, dict) else [plugins]:
        config = getattr(plugin, "deepspeed_config", None) or {}
        offload = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
        if offload.get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer", True):
            warnings.warn(
                "the DeepSpeed configuration offloads the optimizer, and accelerate will run DeepSpeed's own CPU Adam "
                'in the place of this optimizer; add "zero_force_ds_cpu_optimizer": false and '
                '"zero_allow_untested_optimizer": true to it (memopt.deepspeed_config writes both)',
                stacklevel=4,
            )
            return
