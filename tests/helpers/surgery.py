"""An optimizer with state, for tests that change rows of it."""

from __future__ import annotations

import torch
from torch import nn

import memopt
from tests.helpers.cases import HYPER

SHAPES = [(70, 67), (4500,), (5, 24, 65), (33,), (66, 64, 1, 1)]


def made(spec: str, steps: int = 3, **options) -> tuple[list[nn.Parameter], memopt.Optimizer]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if "+" in spec else torch.float32
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    opt = memopt.create(params, spec, lr=1e-2, **HYPER.get(memopt.parse(spec).rule, {}), **options)
    step(params, opt, steps)
    return params, opt


def step(params: list[nn.Parameter], opt: torch.optim.Optimizer, steps: int = 1, first: int = 0) -> None:
    for i in range(first, first + steps):
        g = torch.Generator().manual_seed(i)
        for p in params:
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        opt.step()
