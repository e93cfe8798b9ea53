"""Steps of the Triton kernels: compiled where there is a GPU, else in Triton's interpreter, on small tensors."""

from __future__ import annotations

import torch

import memopt
from tests.kernels.test_kernels import gradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: In 8 and 4 bits the approximate root and other orders of operations meet about 15 ties in a million codes.
MAX_TIES = 2
#: A ragged matrix, a stack, a flat tensor, one that stays in 32 bits, and none: enough for every branch of a kernel.
SHAPES = [(17, 300), (3, 16, 100), (4500,), (33,), (0, 3)]


def parameters(shapes, dtypes=(torch.float32,)) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    made = [torch.randn(shape).to(dtypes[i % len(dtypes)]) for i, shape in enumerate(shapes)]
    return [torch.nn.Parameter(x.to(DEVICE)) for x in made]


def gradients(params: list[torch.nn.Parameter], step: int, dtype: torch.dtype | None = None) -> None:
    torch.manual_seed(100 + step)
    for p in params:
        p.grad = gradient(tuple(p.shape), torch.float32).to(DEVICE, dtype or p.dtype)


def stepped(
    spec, hyper, on, kernel_steps: int, shapes=SHAPES, dtypes=(torch.float32,), plain_steps: int = 1, **keywords
):
    """Parameters and state after a plain step, so that there is state to decode, and steps of the kernels or none."""
    params = parameters(shapes, dtypes)
    opt = memopt.create(params, spec, **hyper, **keywords)
    for step in range(plain_steps + abs(kernel_steps)):
        on(kernel_steps > 0 and step >= plain_steps)
        gradients(params, step)
        opt.step()
    return params, [dict(opt.state[p]) for p in params], opt
