"""What a framework that is already set up would do with an optimizer that is made now."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Container, Iterator, Mapping
from typing import Any

from memopt.core.user_warning import warn

#: A DeepSpeed file is not longer.
MOST_BYTES = 1_000_000
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


#: What takes DeepSpeed's own optimizers out of its way, written as JSON.
KEYS = {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}


def replacement(config: Mapping[str, Any]) -> str | None:
    """What steps in the place of a memopt.Optimizer by this DeepSpeed configuration, and what to change in it, in one
    sentence; None where ours does.

    >>> replacement({"zero_optimization": {"stage": 2}})
    """
    zero, section = config.get("zero_optimization"), config.get("optimizer")
    offload = zero.get("offload_optimizer") if isinstance(zero, Mapping) else None
    device = offload.get("device", "none") if isinstance(offload, Mapping) else "none"
    forced = device not in ("none", None) and config.get("zero_force_ds_cpu_optimizer", True) is not False
    missing = [f'"{key}": {str(value).lower()}' for key, value in KEYS.items() if config.get(key) is not value]
    add = f"; add {' and '.join(missing)} (memopt.deepspeed_config writes both)" if missing else ""
    if "optimizer" in config:
        kind = f" ({section.get('type')})" if isinstance(section, Mapping) and section.get("type") else ""
        return (
            f'the DeepSpeed configuration has an "optimizer" section{kind}: Trainer steps that in '
            "the place of memopt's, accelerate refuses to have both, and deepspeed.initialize steps that where it "
            f'is given no optimizer=; take "optimizer" and "scheduler" out{add}'
        )
    if forced:
        return (
            "the DeepSpeed configuration offloads the optimizer, and accelerate will run DeepSpeed's own CPU Adam "
            f"in the place of memopt's{add}"
        )
    return None


def warn_of_replacement() -> None:
    """Warn where what is set up would step another optimizer than the one that is made now: see :func:`replacement`.

    What was loaded is looked at, and the file that ``accelerate launch`` names; nothing is imported.
    """
    for config in _configurations():
        reason = replacement(config)
        if reason:
            warn(reason)
            return


def launched_file() -> str | None:
    """The DeepSpeed file with which ``accelerate launch`` started this process."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() not in ("true", "1"):
        return None
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    return None if path == "none" else path


def _configurations() -> Iterator[Mapping[str, Any]]:
    """Those of accelerate's state, of transformers' TrainingArguments, and of the launcher."""
    state = sys.modules.get("accelerate.state")
    shared = getattr(getattr(state, "AcceleratorState", None), "_shared_state", None) or {}
    plugins = shared.get("deepspeed_plugins")
    arguments = getattr(sys.modules.get("transformers.integrations.deepspeed"), "_hf_deepspeed_config_weak_ref", None)
    made = [getattr(plugin, "deepspeed_config", None) for plugin in _listed(plugins)]
    made += [getattr(arguments() if arguments is not None else None, "config", None)]
    found = [config for config in made if isinstance(config, Mapping)]
    yield from found
    path = launched_file()
    if path and not found:  # made before Accelerator()
        try:
            with open(path, encoding="utf-8") as file:
                config = json.loads(file.read(MOST_BYTES))
        except (OSError, ValueError):
            return  # accelerate will say what is wrong with it
        if isinstance(config, Mapping):
            yield config


def _listed(plugins: Any) -> list[Any]:
    return list(plugins.values()) if isinstance(plugins, dict) else [plugins]
