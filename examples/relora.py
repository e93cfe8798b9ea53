"""ReLoRA: a low-rank update is merged into its weight every so often, and its moments begin anew.

python examples/relora.py --optim adamw-8bit

Source: Lialin et al., "ReLoRA: high-rank training through low-rank updates", ICLR 2024.
"""

from argparse import ArgumentParser

import torch
from torch import Tensor, nn

import memopt

parser = ArgumentParser()
parser.add_argument("--optim", default="adamw-8bit")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--every", type=int, default=75, help="steps between two restarts")
args = parser.parse_args()


class LoRA(nn.Module):
    """x W^T + x A^T B^T, of which A [rank, in] and B [out, rank] are trained."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width), requires_grad=False)
        self.a = nn.Parameter(torch.randn(rank, width) / width**0.5)
        self.b = nn.Parameter(torch.zeros(width, rank))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + x @ self.a.T @ self.b.T

    @torch.no_grad()
    def merge(self) -> None:
        self.weight += self.b @ self.a
        self.a.normal_().div_(self.a.shape[1] ** 0.5)
        self.b.zero_()


torch.manual_seed(0)
truth = torch.randn(128, 128) / 128**0.5
model = LoRA(128, rank=64)
opt = memopt.create(model, args.optim, lr=1e-2)
warmup = 10


def loss() -> Tensor:
    x = torch.randn(256, 128)
    return (model(x) - x @ truth.T).square().mean()


first = float(loss().detach())
for step in range(args.steps):
    since = step % args.every
    if step and since == 0:
        model.merge()
        opt.reset_state([model.a, model.b], step=0)  # the bias correction begins anew, too
    for group in opt.param_groups:
        group["lr"] = 1e-2 * min(1.0, (since + 1) / warmup)
    now = loss()
    now.backward()
    opt.step()
    opt.zero_grad()
restarts = -(-args.steps // args.every) - 1
print(f"{args.optim}: loss {first:.4f} -> {float(loss().detach()):.4f} after {restarts} restarts")
