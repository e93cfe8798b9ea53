"""Memory-efficient optimizer state for PyTorch: change one string, keep your training script.

Importing memopt does not import torch; :func:`create` does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from memopt.version import __version__ as __version__

#: public name -> the module that defines it
_PUBLIC = {
    "Ledger": "memopt.core.ledger",
    "Line": "memopt.core.ledger",
    "OptimSpec": "memopt.spec",
    "Optimizer": "memopt.optimizer",
    "SpecError": "memopt.core.hyperparameters",
    "clip_grad_norm_": "memopt.training.clip",
    "clip_grad_value_": "memopt.training.clip",
    "balance": "memopt.pricing.balance",
    "create": "memopt.factory",
    "deepspeed_config": "memopt.integrations.deepspeed",
    "describe": "memopt.training.param_groups",
    "fit": "memopt.pricing.fit",
    "load": "memopt.checkpoint",
    "lookahead": "memopt.spec",
    "measure": "memopt.diagnosis.measured",
    "param_groups": "memopt.training.param_groups",
    "parse": "memopt.spec",
    "price": "memopt.pricing.price",
    "recipe": "memopt.recipes",
    "save": "memopt.checkpoint",
    "scale_rate": "memopt.training.lr_scaling",
    "schedule": "memopt.training.schedules",
    "shard": "memopt.integrations.fsdp",
    "specs": "memopt.spec",
    "watch": "memopt.diagnosis",
}

__all__ = [
    "Ledger",
    "Line",
    "OptimSpec",
    "Optimizer",
    "SpecError",
    "balance",
    "clip_grad_norm_",
    "clip_grad_value_",
    "create",
    "deepspeed_config",
    "describe",
    "fit",
    "load",
    "lookahead",
    "measure",
    "param_groups",
    "parse",
    "price",
    "recipe",
    "save",
    "scale_rate",
    "schedule",
    "shard",
    "specs",
    "watch",
]

if TYPE_CHECKING:
    from memopt.checkpoint import load, save
    from memopt.core.hyperparameters import SpecError
    from memopt.core.ledger import Ledger, Line
    from memopt.diagnosis import watch
    from memopt.factory import create
    from memopt.integrations.deepspeed import deepspeed_config
    from memopt.integrations.fsdp import shard
    from memopt.optimizer import Optimizer
    from memopt.pricing.balance import balance
    from memopt.pricing.fit import fit
    from memopt.pricing.price import price
    from memopt.recipes import recipe
    from memopt.spec import OptimSpec, lookahead, parse, specs
    from memopt.training.clip import clip_grad_norm_, clip_grad_value_
    from memopt.training.lr_scaling import scale_rate
    from memopt.training.param_groups import describe, param_groups
    from memopt.training.schedules import schedule


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'memopt' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
