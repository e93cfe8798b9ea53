"""Points that are cloned, split and pruned while they are fitted, as in Gaussian splatting; their moments go with them.

python examples/densify.py --optim adam-8bit

Bumps at points on a plane are added up to draw an image. Every few steps points with a large gradient are cloned, large
ones are split into two smaller ones, and those that have faded are removed. A point is a row of each of three weights,
which are resized together.
"""

from argparse import ArgumentParser

import torch
from torch import Tensor, nn

import memopt

parser = ArgumentParser()
parser.add_argument("--optim", default="adam-8bit")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--every", type=int, default=50, help="steps between two changes of the points")
args = parser.parse_args()

torch.manual_seed(0)
SIZE, POINTS, FEATURES = 24, 80, 64
y, x = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")
grid = torch.stack([x, y], -1).view(-1, 2)
# A ring in FEATURES colours.
target = torch.exp(-30 * (grid.norm(dim=1) - 0.6).square())[:, None] * torch.linspace(0.2, 1, FEATURES)

place = nn.Parameter(torch.rand(POINTS, 2) * 2 - 1)
width = nn.Parameter(torch.full((POINTS, 1), -1.5))
colour = nn.Parameter(torch.rand(POINTS, FEATURES) * 0.1)
weights = {"place": place, "width": width, "colour": colour}
opt = memopt.create([{"params": [(name, p)]} for name, p in weights.items()], args.optim, lr=1e-2)


def loss() -> Tensor:
    distance = (grid[:, None] - place).square().sum(-1)
    bumps = torch.exp(-distance / (2 * torch.exp(width).T.square()))
    return (bumps @ colour - target).square().mean()


def densify(gradient: Tensor) -> tuple[int, int]:
    """Clone, split and prune; how many points came and went."""
    before = len(place)
    wanted = gradient > gradient.quantile(0.9)
    large = wanted & (width.detach().view(-1) > -1.4)
    for name, p in weights.items():
        new = p.detach()[wanted].clone()
        if name == "place":
            new += torch.randn_like(new) * 0.02
        opt.append_rows(p, new)  # their moments begin at zero
    with torch.no_grad():
        width[: len(large)][large] -= 0.5
    opt.reset_state([place, width, colour], rows=large.nonzero().view(-1))  # what is split begins anew
    keep = colour.detach().norm(dim=1) > 0.02
    for p in weights.values():
        opt.select_rows(p, keep)  # the others keep their moments, code for code
    return int(wanted.sum()), before + int(wanted.sum()) - len(place)


first = float(loss().detach())
for step in range(1, args.steps + 1):
    now = loss()
    now.backward()
    opt.step()
    gradient = place.grad.norm(dim=1)
    opt.zero_grad()
    if step % args.every == 0 and step < args.steps:
        came, went = densify(gradient)
        print(f"step {step}: {came} points came, {went} went, {len(place)} are there, loss {float(now.detach()):.5f}")
last = float(loss().detach())
print(f"{args.optim}: loss {first:.5f} -> {last:.5f} with {len(place)} points, {opt.ledger().nbytes:,} bytes of state")
