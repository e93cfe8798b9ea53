"""One model that several ranks of another tool train, and its state goes on here."""

import torch
from torch import nn

import memopt

LR = 1e-3
STEPS, MORE = 3, 2
#: Sums of gradients in another order; a hundredth of a step.
EXACT = 1e-5
#: Mean distance after two steps from 8-bit codes, as a share of the rate.
MEAN_DISTANCE = 0.05
WORLD = 2


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 65), nn.LayerNorm(65), nn.Linear(65, 129, bias=False)).to(dtype)


def groups(module):
    decay = [p for p in module.parameters() if p.dim() > 1]
    rest = [p for p in module.parameters() if p.dim() == 1]
    return [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def batch(step, rank):
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(10 * step + rank))


def losses(module, step):
    """The mean of all ranks' losses."""
    dtype = next(module.parameters()).dtype
    return sum(module(batch(step, r).to(dtype)).float().square().mean() for r in range(WORLD)) / WORLD


def train(module, opt, first, steps):
    for step in range(first, first + steps):
        losses(module, step).backward()
        opt.step()
        opt.zero_grad()


def ours_after(folder, begin, spec="adamw", **keywords):
    """The parameters when ours goes on from the folder for the rest of the steps."""
    module = model()
    module.load_state_dict(begin)
    opt = memopt.create(memopt.param_groups(module, weight_decay=0.1), spec, lr=1.0)
    memopt.load(folder, optimizer=opt, **keywords)
    assert opt.param_groups[0]["lr"] == LR
    train(module, opt, STEPS, MORE)
    return dict(module.named_parameters())


def distance(a, b):
    return torch.cat([(a[name].detach() - b[name]).abs().flatten() for name in b])
