"""What a framework that is already set up would do with an optimizer that is made now."""

from __future__ import annotations

import sys
from collections.abc import Container, Mapping
from typing import Any

from memopt.core.user_warning import warn

#: Our hyperparameters, and what transformers' TrainingArguments call them.
_TRAINERS = {"lr": ("learning_rate",), "betas": ("adam_beta1", "adam_beta2"), "eps": ("adam_epsilon",)}


def warn_of_arguments(given: Container[str], hyper: Mapping[str, Any]) -> None:
    """Warn where transformers' Trainer makes this optimizer by ``optimizer_cls_and_kwargs`` and has other values in its
    own arguments, which it hands to its own optimizers alone. ``given`` are the hyperparameters that the caller named,
    ``hyper`` all of them."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "create_optimizer" and frame.f_globals.get("__name__") == "transformers.trainer":
            break
    else:
        return
    arguments = getattr(frame.f_locals.get("self"), "args", None)
    found, keywords = [], []
    for name, theirs in _TRAINERS.items():
        values = tuple(getattr(arguments, one, None) for one in theirs)
        value = values if len(values) > 1 else values[0]
        fields = getattr(arguments, "__dataclass_fields__", {})
        # A rate is always theirs; what else they did not set is of AdamW.
        is_set = name == "lr" or any(
            v != getattr(fields.get(one), "default", v) for one, v in zip(theirs, values, strict=True)
        )
        if name in hyper and name not in given and None not in values and is_set and hyper[name] != value:
            found.append(f"{', '.join(theirs)} {value!r} ({name} is {hyper[name]!r} here)")
            keywords.append(f'"{name}": {value!r}')
    if found:
        warn(
            f"Trainer does not hand its arguments to optimizer_cls_and_kwargs: {'; '.join(found)}. Name the ones that "
            f"are wanted beside the spec: {{{', '.join(keywords)}}}"
        )


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
            warn(
                "the DeepSpeed configuration offloads the optimizer, and accelerate will run DeepSpeed's own CPU Adam "
                'in the place of this optimizer; add "zero_force_ds_cpu_optimizer": false and '
                '"zero_allow_untested_optimizer": true to it (memopt.deepspeed_config writes both)'
            )
            return
