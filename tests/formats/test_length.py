"""The length of a step: what rounding a moment at every step does to the mean of an update."""

import torch
from torch import nn

import memopt
from memopt.core.registry import FORMATS

BOUND = 0.01
#: Of powers of two, whose scatter is the largest.
BOUND_4BIT = 0.015
#: One format alone, and with each other for second moments.
SPECS = ["adamw", *(f"adamw-{name}" for name in FORMATS if name != "32bit"), "adamw-8bit.fp8", "adamw-8bit.4bit"]


def test_updates_of_independent_gradients_are_as_long_as_those_of_fp32():
    """sum(u u32) / sum(u32 u32) - 1: dividing by the root of a second moment that scatters is too long a step."""
    g = torch.Generator().manual_seed(0)
    exact, *params = (nn.Parameter(torch.zeros(32, 256)) for _ in [None, *SPECS])
    how = {"lr": 1.0, "betas": (0.9, 0.995), "weight_decay": 0.0}
    opts = [
        torch.optim.AdamW([exact], **how),
        *(memopt.create([p], s, **how) for p, s in zip(params, SPECS, strict=True)),
    ]
    sums = torch.zeros(len(SPECS) + 1, dtype=torch.float64)
    for step in range(600):
        x = torch.randn(32, 256, generator=g)
        for p, opt in zip([exact, *params], opts, strict=True):
            p.data.zero_()
            p.grad = x.clone()
            opt.step()
        if step >= 500:
            sums += torch.stack([(p.detach().double() * exact.detach().double()).sum() for p in [exact, *params]])
    length = dict(zip(SPECS, (sums[1:] / sums[0] - 1).tolist(), strict=True))
    assert all(abs(x) < (BOUND_4BIT if "4bit" in spec else BOUND) for spec, x in length.items()), length
