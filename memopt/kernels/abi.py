"""The structs of ``src/abi.h``, field by field."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, Structure, addressof, c_double, c_int32, c_int64, c_uint8, c_uint32, c_void_p
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 9
#: Columns of a row of a tensor whose format has no rows.
CHUNK = 1024
SLOTS = 4

#: Enumerators of abi.h.
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
RULES = {
    "adam": 0,
    "adamw": 0,
    "lion": 1,
    "sgd": 2,
    "rmsprop": 3,
    "radam": 4,
    "adafactor": 5,
    "came": 6,
    "adabound": 7,
    "ademamix": 8,
    "adammini": 9,
    "lamb": 10,
    "stableadamw": 11,
    "sinkgd": 13,
    "prodigy": 14,
}
#: Rules that take several passes in every format; the others do where a moment is factored. The first pass shows what
#: is not finite.
SEVERAL_PASSES = ("adafactor", "came", "adammini", "lamb", "stableadamw", "sinkgd")
#: In two passes around its products (memopt/kernels/matrix_step.py).
MUON = 12
MASTERS = {"none": 0, "fp32": 1, "kahan": 2, "stochastic": 3, "split": 4, "split16": 5}
FORMATS = {"32bit": 0, "bf16": 1, "8bit": 2, "fp8": 3, "4bit": 4, "factored": 5}
#: Of a tensor whose moments are in several of them.
MIXED, MIXED_FACTORED, FACTORED_8, FACTORED_4 = 6, 7, 8, 9
ALL_FACTORED = (FORMATS["factored"], MIXED_FACTORED, FACTORED_8, FACTORED_4)

MAXIMIZE, AMSGRAD, DECOUPLED, NESTEROV, CENTERED = 1, 2, 4, 8, 16
MOMENTUM, TRANSFORMERS, SCALE_PARAMETER, RELATIVE_STEP, WARMUP_INIT = 32, 64, 128, 256, 512
SLICED_SUMS = 2048
#: No kernel knows it: a plan is to see that it has changed.
CAUTIOUS = 1024

#: The fixed place of every moment.
SLOT = {
    "exp_avg_sq": 0,
    "square_avg": 0,
    "exp_avg": 1,
    "momentum_buffer": 1,
    "max_exp_avg_sq": 2,
    "exp_avg_res": 2,
    "grad_avg": 2,
    "exp_avg_slow": 2,
    "moved": 2,
    "grad_sum": 3,
}


#: The numbers of a param group, in order.
HYPER = (
    "lr",
    "weight_decay",
    "beta1",
    "beta2",
    "beta3",
    "eps",
    "eps2",
    "d",
    "momentum",
    "dampening",
    "final_lr",
    "peak",
    "gamma",
    "alpha",
    "alpha_steps",
    "beta3_steps",
    "slow_steps",
    "slow_rate",
)
#: Of rules that have kernels on the CPU alone.
CPU_HYPER = ("iterations", "power_iterations", "d0", "corrected", "safeguard")


class Group(Structure):
    _fields_ = [("rule", c_int32), ("flags", c_uint32)] + [
        (name, c_double) for name in (*HYPER, *CPU_HYPER, "gradient_scale")
    ]


class TensorStep(Structure):
    _fields_ = [
        ("p", c_void_p),
        ("g", c_void_p),
        ("data", c_void_p * SLOTS),
        ("aux", c_void_p * SLOTS),
        ("kept", c_void_p),
        ("layout", POINTER(c_int64)),
        ("slow", c_void_p),
        ("reported", c_double * 2),
        ("counter", c_void_p),
        ("step", c_int64),
        ("rows", c_int64),
        ("cols", c_int64),
        ("numel", c_int64),
        ("first_row", c_int64),
        ("height", c_int64),
        ("whole_numel", c_int64),
        ("whole_height", c_int64),
        ("span", c_int64),
        ("whole_cols", c_int64),
        ("index", c_uint32),
        ("group", c_uint32),
        ("order", c_uint8 * SLOTS),
        ("formats", c_uint8 * SLOTS),
        ("format", c_uint8),
        ("p_dtype", c_uint8),
        ("g_dtype", c_uint8),
        ("dims", c_uint8),
        ("stacked", c_uint8),
        ("cut", c_uint8),
        ("master", c_uint8),
        ("idle", c_uint8),
    ]


#: int32_t (*)(double* numbers, int64_t n)
TotalCallback = CFUNCTYPE(c_int32, POINTER(c_double), c_int64)
#: Where there are no other ranks.
ALONE = TotalCallback()


def over_ranks(total: Callable[[Tensor], Tensor]) -> tuple[Any, list[BaseException]]:
    """What the kernels call for a sum, and where an error that it meets is put: none can pass through C."""
    import torch

    failed: list[BaseException] = []

    def call(numbers: Any, n: int) -> int:
        try:
            here = torch.frombuffer((c_double * n).from_address(addressof(numbers.contents)), dtype=torch.float64)
            here.copy_(total(here))
        except BaseException as error:
            failed.append(error)
        return len(failed)

    return TotalCallback(call), failed


class GradientSpan(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("numel", c_int64),
        ("squares", c_double),
        ("dtype", c_uint8),
        ("idle", c_uint8),
        ("bad", c_uint8),
    ]


STRUCTS = (Group, TensorStep, GradientSpan)
__all__ = ["ALONE", "STRUCTS", "GradientSpan", "Group", "TensorStep", "TotalCallback", "c_int64", "over_ranks"]
