"""What each hyperparameter may be. One table: name -> (what is allowed, test)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any


class SpecError(ValueError):
    """A spec or a hyperparameter that means nothing; the message names the value and what is allowed."""


def is_number(value: Any) -> bool:
    """A finite number: Python's, or what turns into one, such as a tensor of one element. A string is none, though
    ``float`` would read it: YAML takes ``1e-4`` for one, and a scheduler cannot multiply it."""
    if isinstance(value, (bool, str, bytes)):
        return False
    try:
        return isfinite(float(value))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def _at_least_zero(value: Any) -> bool:
    return is_number(value) and float(value) >= 0


def _fraction(value: Any) -> bool:
    return is_number(value) and 0 <= float(value) < 1


def _pair(test: Callable[[Any], bool], first_may_be_none: bool = False) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            return False
        return (test(value[0]) or (first_may_be_none and value[0] is None)) and test(value[1])

    return check


def _fractions(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) in (2, 3) and all(_fraction(v) for v in value)


def _eps(value: Any) -> bool:
    return _at_least_zero(value) or _pair(_at_least_zero, first_may_be_none=True)(value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _numbers(value: Any, count: int) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == count and all(map(is_number, value))


def _bool(value: Any) -> bool:
    return isinstance(value, bool)


#: What is added to the norm of gradients before a bound is divided by it, as torch does.
CLIP_EPS = 1e-6
#: Hyperparameters that are on or off.
FLAGS = (
    "maximize",
    "cautious",
    "amsgrad",
    "nesterov",
    "centered",
    "decoupled_weight_decay",
    "scale_parameter",
    "relative_step",
    "warmup_init",
)

#: A key ``rule.name`` is for a rule that means something else by the name.
CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("a finite number >= 0, or None where the rule makes its own", lambda v: v is None or _at_least_zero(v)),
    "betas": ("numbers in [0, 1)", _fractions),
    "beta1": ("None or a number in [0, 1)", lambda v: v is None or _fraction(v)),
    "eps": ("a finite number >= 0, or for factored rules a pair of them", _eps),
    "weight_decay": ("a finite number >= 0", _at_least_zero),
    "momentum": ("a finite number >= 0", _at_least_zero),
    "dampening": ("a finite number", is_number),
    "alpha": ("a number in [0, 1]", lambda v: is_number(v) and 0 <= float(v) <= 1),
    "ademamix.alpha": ("a finite number >= 0", _at_least_zero),
    "t_alpha": ("None or an integer >= 1, a number of steps", lambda v: v is None or _count(v)),
    "t_beta3": ("None or an integer >= 1, a number of steps", lambda v: v is None or _count(v)),
    "final_lr": ("a finite number > 0", lambda v: is_number(v) and float(v) > 0),
    "base_lr": ("None or a finite number >= 0", lambda v: v is None or _at_least_zero(v)),
    "gamma": ("a number in (0, 1)", lambda v: _fraction(v) and float(v) > 0),
    "lookahead_steps": ("an integer >= 1", lambda v: _count(v)),
    "lookahead_rate": ("a number in (0, 1]", lambda v: is_number(v) and 0 < float(v) <= 1),
    "beta2_decay": ("a finite number <= 0", lambda v: is_number(v) and float(v) <= 0),
    "d": ("a finite number >= 1", lambda v: is_number(v) and float(v) >= 1),
    "convention": (
        "'absolute', 'torch' or 'transformers'",
        lambda v: v in ("absolute", "torch", "transformers"),
    ),
    "ns_coefficients": ("three finite numbers", lambda v: _numbers(v, 3)),
    "beta2": ("a number in [0, 1)", _fraction),
    "split_rows": (
        "None, an integer >= 2 or row counts, integers >= 1",
        lambda v: (
            v is None or (_count(v) and v > 1) or (isinstance(v, (tuple, list)) and bool(v) and all(map(_count, v)))
        ),
    ),
    "ns_steps": ("an integer from 1 to 99", lambda v: _count(v) and v < 100),
    "ns_dtype": ("'auto', 'bfloat16' or 'float32'", lambda v: v in ("auto", "bfloat16", "float32")),
    "adjust_lr_fn": (
        "'original', 'match_rms_adamw', 'spectral_norm' or 'none'",
        lambda v: v in ("original", "match_rms_adamw", "spectral_norm", "none"),
    ),
    "muon.momentum": ("a number in [0, 1)", _fraction),
    **dict.fromkeys(FLAGS, ("True or False", _bool)),
}


#: What a rule says of hyperparameters of its own, in the form of :data:`CHECKS`.
Checks = Mapping[str, tuple[str, Callable[[Any], bool]]]


def check(rule: str, values: Mapping[str, Any], own: Checks) -> None:
    """Raise :class:`SpecError` for the first value that is not allowed."""
    for name, value in values.items():
        allowed, ok = own.get(name) or CHECKS.get(f"{rule}.{name}") or CHECKS[name]
        if not ok(value):
            raise SpecError(f"{rule}: {name}={value!r} is not allowed; {name} must be {allowed}")


def check_live(rule: str, values: Mapping[str, Any], own: Checks) -> None:
    """Raise :class:`SpecError` for a value that a param group was given after it was made and that is no number where
    one is wanted, or a word. Signs and ranges are the owner's, as in torch.optim; tensors are not waited for."""
    for name, value in values.items():
        if type(value) is float and isfinite(value):
            continue
        allowed, ok = own.get(name) or CHECKS.get(f"{rule}.{name}") or CHECKS[name]
        if name in FLAGS:
            fine = isinstance(value, (bool, int))
        elif isinstance(value, str):
            fine = ok(value)
        else:
            parts = value if isinstance(value, (tuple, list)) else (value,)
            fine = all(hasattr(part, "device") or is_number(part) for part in parts) or ok(value)
        if not fine:
            raise SpecError(f"{rule}: {name}={value!r} is not allowed; {name} must be {allowed}")


def check_max_grad_norm(value: Any, engine: str = "native") -> None:
    """Raise :class:`SpecError` for a bound of the norm of all gradients that is none. ``inf`` measures and clips
    nothing."""
    number = not isinstance(value, (bool, str, bytes)) and hasattr(value, "__float__")
    if value is not None and not (number and float(value) > 0):
        raise SpecError(f"max_grad_norm={value!r} is not allowed; it must be a number > 0 (inf only measures), or None")
    if value is not None and engine != "native":
        raise SpecError(
            f"max_grad_norm={value!r} with engine={engine!r}: its kernels take gradients as they are; call "
            "memopt.clip_grad_norm_(model, max_norm) before the step, or use the native engine"
        )


def check_names(rule: str, given: Mapping[str, Any], allowed: Mapping[str, Any]) -> None:
    """Raise :class:`SpecError` for a name that the rule does not have."""
    unknown = [name for name in given if name not in allowed]
    if unknown:
        hint = ""
        if set(unknown) & {"foreach", "fused", "capturable", "differentiable"}:
            hint = " (memopt chooses its kernel itself; opt.explain() says which)"
        raise SpecError(f"{rule} has no hyperparameter {unknown[0]!r}{hint}; it has {', '.join(allowed)}")
