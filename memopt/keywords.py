"""Every keyword of :func:`memopt.create` and what it may be, as a type: an editor completes them and a type checker
reads them wherever ``**fields: Unpack[SpecKeywords]`` stands.

:func:`memopt.create` spells the same keywords out, where ``help()`` and :func:`inspect.signature` see them too;
``tests/spec/test_signatures.py`` holds both lists against the rules, the placements and the fields of a spec.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict

if TYPE_CHECKING:
    from torch import Tensor


class Unset:
    """What stands in a signature for "not given"; ``help()`` shows ``text``, which says what holds then."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text: Final = text

    def __repr__(self) -> str:
        return f"<{self.text}>"


#: For a hyperparameter: the default differs by rule.
RULE_DEFAULT: Final = Unset("the rule's default")
#: For a field of the spec: what the string or the OptimSpec says.
SPEC_DEFAULT: Final = Unset("what the spec says")
#: For an option of a placement, which specs without that placement do not have.
PLACEMENT_DEFAULT: Final = Unset("the placement's default")


class Hyperparameters(TypedDict, total=False):
    """Every hyperparameter of every rule. A rule's own are in ``memopt list RULE``."""

    lr: float | Tensor | None
    betas: tuple[float, ...]
    eps: float | tuple[float | None, float]
    weight_decay: float
    maximize: bool
    cautious: bool
    amsgrad: bool
    momentum: float
    dampening: float
    nesterov: bool
    alpha: float
    centered: bool
    decoupled_weight_decay: bool
    d: float | None
    beta1: float | None
    beta2_decay: float
    scale_parameter: bool
    relative_step: bool
    warmup_init: bool
    convention: Literal["absolute", "torch", "transformers"]
    t_alpha: int | None
    t_beta3: int | None
    final_lr: float
    base_lr: float | None
    gamma: float
    beta2: float
    split_rows: int | tuple[int, ...] | None
    ns_coefficients: tuple[float, float, float]
    ns_steps: int
    ns_dtype: Literal["auto", "bfloat16", "float32"]
    adjust_lr_fn: Literal["original", "match_rms_adamw", "spectral_norm", "none"]
    d_coef: float
    d_numerator: float
    d0: float
    beta3: float | None
    use_bias_correction: bool
    safeguard_warmup: bool
    sliced: bool
    sinkhorn_steps: int
    spectral_steps: int
    projection_rank: int
    update_proj_gap: int
    scale: float
    scale_type: Literal["channel", "tensor"]
    norm_growth: float
    lookahead_steps: int
    lookahead_rate: float


class PlacementOptions(TypedDict, total=False):
    """Every option of every placement (:data:`memopt.spec.placement_options.OPTIONS`)."""

    directory: str | PathLike[str]
    workspace: int | str
    resident: int | str
    offload_gradients: bool | Literal["early"]


class SpecKeywords(Hyperparameters, PlacementOptions, total=False):
    """Hyperparameters, placement options and fields of :class:`memopt.OptimSpec`."""

    rule: str
    format: str
    fallback: str
    master: str
    placement: str
    partition: str
    engine: Literal["native", "bitsandbytes"]
    overrides: Mapping[str, str]
    hyper: Mapping[str, Any]
    rules: Mapping[str, Mapping[str, Any]]
    options: Mapping[str, Any]


class OptimizerKeywords(SpecKeywords, total=False):
    """Those, and the keywords of :class:`memopt.Optimizer`: all that :func:`memopt.create` takes."""

    nonfinite: Literal["skip", "raise", "propagate"]
    seed: int
    process_group: Any
    kinds: Mapping[str, str] | None
    capturable: bool
    on_mismatch: Literal["convert", "refuse"]
    max_grad_norm: float | None
