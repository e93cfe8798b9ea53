"""A model whose parameters have several rules."""

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(90, 64)
        self.up = nn.Linear(64, 96)
        self.norm = nn.LayerNorm(96)
        self.down = nn.Linear(96, 64)
        self.last = nn.Linear(64, 90)  # an output head by its size, not by its name

    def forward(self, tokens):
        return self.last(self.down(self.norm(self.up(self.embed(tokens))).relu()))


def model():
    torch.manual_seed(0)
    return Model()


def train(net, opt, first, steps):
    """On gradients that do not depend on the weights, so that no difference is amplified."""
    for step in range(first, first + steps):
        g = torch.Generator().manual_seed(step)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=g)
        opt.step()


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])
