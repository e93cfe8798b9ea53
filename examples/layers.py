"""A checkpoint goes into a model that has another head and more rows: what is in both is taken, the rest is named.

python examples/layers.py --optim adamw-8bit
"""

import tempfile
from argparse import ArgumentParser

import torch
from torch import nn

import memopt

parser = ArgumentParser()
parser.add_argument("--optim", default="adamw-8bit")
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()


def model(rows: int, head: str, classes: int) -> nn.ModuleDict:
    return nn.ModuleDict({"embedding": nn.Embedding(rows, 64), "body": nn.Linear(64, 64), head: nn.Linear(64, classes)})


def train(net: nn.ModuleDict, opt: torch.optim.Optimizer, rows: int, head: str) -> float:
    loss = torch.zeros(())
    for _ in range(args.steps):
        x = torch.randint(rows, (32,))
        logits = net[head](torch.relu(net["body"](net["embedding"](x))))
        loss = nn.functional.cross_entropy(logits, x % logits.shape[1])
        loss.backward()
        opt.step()
        opt.zero_grad()
    return float(loss.detach())


torch.manual_seed(0)
with tempfile.TemporaryDirectory() as folder:
    old = model(500, "pretraining", 10)
    opt = memopt.create(old, args.optim, lr=1e-2)
    train(old, opt, 500, "pretraining")
    memopt.save(folder, model=old, optimizer=opt)

    new = model(520, "classifier", 7)
    opt = memopt.create(new, args.optim, lr=1e-3)
    loaded = memopt.load(folder, model=new, optimizer=opt, strict=False)
    print("\n".join(loaded.notes))
    print(f"loss {train(new, opt, 520, 'classifier'):.3f}")
