"""Rules of several passes find NaN and Inf in their first one: nothing changes then, and else the bits are the same."""

from math import inf, nan

import pytest
import torch

import memopt
from memopt import kernels
from tests.helpers.cases import HYPER, assert_same_bits

pytestmark = pytest.mark.skipif(kernels.library() is None, reason=f"no kernels here: {kernels.missing()}")

SHAPES = [(17, 300), (3, 16, 100), (4500,), (33,), (0, 3)]
RULES = ("adafactor", "came", "adammini", "lamb", "stableadamw")
SPECS = [f"{rule}{form}" for rule in RULES for form in ("", "-8bit")] + ["came-4bit", "lamb-bf16", "adafactor-32bit"]
SPECS += [f"{rule}-factored" for rule in ("adamw", "rmsprop", "radam", "lamb", "stableadamw", "ademamix", "adabound")]
SPECS += ["adamw-8bit.factored", "adamw-4bit.factored", "came-8bit.factored", "lamb+kahan", "lookahead(lamb)"]


def make(spec: str, nonfinite: str = "skip", **keywords):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if "+" in spec else torch.float32
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    hyper = HYPER.get(memopt.parse(spec).rule, {})
    return params, memopt.create(params, spec, nonfinite=nonfinite, **hyper, **keywords)


def give(params, step: int, factor: float = 1.0) -> None:
    torch.manual_seed(100 + step)
    for p in params:
        p.grad = (factor * torch.randn(p.shape)).to(p.dtype)


def everything(params, opt):
    return [x for p in params for x in (p.detach(), *(x for _, x in sorted(opt.state[p].items())))]


@pytest.mark.filterwarnings("ignore:NaN or Inf")
@pytest.mark.parametrize("spec", SPECS)
def test_nothing_changes_where_a_gradient_is_not_finite(spec) -> None:
    params, opt = make(spec)
    others, other = make(spec, nonfinite="propagate")
    for step in range(3):
        give(params, step), give(others, step)
        if step:
            for which, place, bad in ((0, 0, nan), (1, -1, inf), (2, 4097, -inf), (3, -1, nan)):
                kept = params[which].grad.clone()
                params[which].grad.view(-1)[place] = bad
                before = [x.clone() for x in everything(params, opt)]
                opt.step()
                for a, b in zip(before, everything(params, opt), strict=True):
                    assert_same_bits(a, b)
                params[which].grad.copy_(kept)
        opt.step(), other.step()
    assert opt.skipped_steps == 8
    for a, b in zip(everything(params, opt), everything(others, other), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("spec", ["adafactor", "lamb", "adamw-8bit.factored", "adammini"])
def test_numbers_whose_squares_fp32_cannot_hold_are_finite(spec) -> None:
    params, opt = make(spec, nonfinite="raise")
    others, other = make(spec, nonfinite="propagate")
    for step in range(3):
        give(params, step, 1e25 if step == 2 else 1.0), give(others, step, 1e25 if step == 2 else 1.0)
        opt.step(), other.step()
    for a, b in zip(everything(params, opt), everything(others, other), strict=True):
        assert_same_bits(a, b)


def test_the_error_names_the_gradient_and_large_tensors_are_restored() -> None:
    """Of more elements than one thread takes alone, in bands of rows and of columns."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((900, 600), (40, 13200))]
    opt = memopt.create(params, "adafactor", nonfinite="raise")
    give(params, 0)
    opt.step()
    before = [x.clone() for x in everything(params, opt)]
    params[1].grad[39, 13199] = nan
    with pytest.raises(FloatingPointError, match="gradient of 1"):
        opt.step()
    for a, b in zip(before, everything(params, opt), strict=True):
        assert_same_bits(a, b)
