"""What to do with the rate when the batch grows or shrinks."""

from __future__ import annotations

from typing import Any

from memopt.core.hyperparameters import SpecError

#: rule -> (the power of the ratio of the batches, whose advice it is)
SCALINGS = {
    "linear": (1.0, "Goyal et al. 2017, for SGD with momentum and a warm-up"),
    "sqrt": (0.5, "Krizhevsky 2014; for Adam and its kin Malladi et al. 2022"),
}


def scale_rate(lr: float, batch: float, base_batch: float, rule: str = "sqrt") -> float:
    """The learning rate for another batch size::

        lr * (batch / base_batch)^power            power 1 for "linear", 1/2 for "sqrt"

    Args:
        lr: The rate that is right for ``base_batch``, > 0.
        batch: The new batch size, in whatever unit ``base_batch`` is in (samples, tokens), > 0.
        base_batch: The batch size that ``lr`` was tuned for, > 0.
        rule: ``"linear"`` for SGD with momentum (Goyal et al. 2017), ``"sqrt"`` for Adam, AdamW and LAMB (Krizhevsky
            2014, Malladi et al. 2022).

    Returns:
        The rate, a float.

    Raises:
        SpecError: for an unknown rule and for numbers that are not finite and > 0.

    >>> scale_rate(1e-3, batch=4096, base_batch=256, rule="sqrt"), scale_rate(0.1, 512, 256, rule="linear")
    (0.004, 0.2)
    """
    if rule not in SCALINGS:
        raise SpecError(f"unknown scaling {rule!r}; allowed: {', '.join(SCALINGS)}")
    for name, value in {"lr": lr, "batch": batch, "base_batch": base_batch}.items():
        _check(name, value)
    return lr * float((batch / base_batch) ** SCALINGS[rule][0])


def _check(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise SpecError(f"{name}={value!r} is not allowed; it must be a finite number > 0")
