"""Parameters and gradients for tests of clipping."""

import torch

import memopt
from tests.helpers.cases import HYPER
from tests.kernels.test_kernels import gradient

SHAPES = [(17, 300), (3, 16, 100), (4500,), (33,), (0, 3)]
BOUND = 0.25


def make(spec: str, dtype=torch.float32, shapes=SHAPES, **keywords):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    return params, memopt.create(params, spec, **HYPER.get(memopt.parse(spec).rule, {}), **keywords)


def give(params, step: int, factor: float = 1.0, dtype=None) -> None:
    torch.manual_seed(100 + step)
    for p in params:
        p.grad = (factor * gradient(tuple(p.shape), torch.float32)).to(dtype or p.dtype)
