"""The real tools whose optimizer state is read and written, and one model that all of them train."""

import pytest
import torch
from torch import nn

#: Exact formats: other order of operations only; a hundredth of a step.
EXACT = 1e-5
#: Mean distance after five steps in other codes, as a share of the rate (measured: 0.021, 0.052 and 0.32).
MEAN_DISTANCE = {"8bit": 0.04, "fp8": 0.1, "4bit": 0.5}
LR = 1e-3


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64), nn.LayerNorm(64), nn.Linear(64, 80))


def drive(module, opt, first, steps):
    for step in range(first, first + steps):
        g = torch.Generator().manual_seed(step)
        for p in module.parameters():
            p.grad = torch.randn(p.shape, generator=g)
        opt.step()


def torch_tool(name, **keywords):
    return lambda params: getattr(torch.optim, name)(params, **keywords)


def bnb_tool(name, **keywords):
    def build(params):
        bnb = pytest.importorskip("bitsandbytes")
        return getattr(bnb.optim, name)(params, **keywords)

    return build


def torchao_tool(name):
    def build(params):
        module = pytest.importorskip("torchao.optim")
        return getattr(module, name)(params, lr=LR, weight_decay=0.1)

    return build


def transformers_tool(**keywords):
    def build(params):
        return pytest.importorskip("transformers.optimization").Adafactor(params, **keywords)

    return build


def distance(a, b):
    """|a - b| of every parameter, as a share of the rate."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return torch.cat([(p - q).detach().abs().flatten() for p, q in pairs]) / LR
