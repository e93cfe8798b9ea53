"""What tests of masters have in common."""

import torch

import memopt
from tests.helpers.cases import HYPER

LOW = [torch.bfloat16, torch.float16]
#: Bits of precision of weight and tensor beside it: the largest relative error is 2 to the minus this.
BITS = {
    "none": (8, 11),
    "fp32": (24, 24),
    "kahan": (17, 23),
    "stochastic": (7, 10),
    "split": (15, 18),
    "split16": (24, 24),
}
#: Bytes beside each bf16 parameter.
NBYTES = {"none": 0, "fp32": 4, "kahan": 2, "stochastic": 0, "split": 1, "split16": 2}


def drive(model, opt, first, steps, scale=1.0):
    for step in range(first, first + steps):
        g = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = (torch.randn(p.shape, generator=g) * scale).bfloat16().to(p.dtype)
        opt.step()


def hyper_of(spec):
    return HYPER.get(memopt.parse(spec).rule, {})
