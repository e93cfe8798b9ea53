"""Fine-tune with low-rank adapters: only they have gradients, so only they have optimizer state.

python examples/recipe_lora.py model.pt --text notes/ --recipe qlora
"""

from argparse import ArgumentParser

import torch
from torch import nn

import memopt
from memopt.train.job import ModelConfig
from memopt.train.model import LanguageModel
from memopt.train.run import validate
from memopt.train.text import Corpus, load_text


class Adapted(nn.Module):
    """A frozen linear layer W with W x + (alpha / r) B A x; B begins at zero. Source: Hu et al. 2021."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.layer, self.scale = layer, alpha / rank
        self.a = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.scale * (x @ self.a.T @ self.b.T)


parser = ArgumentParser()
parser.add_argument("weights")
parser.add_argument("--text", default=memopt.__path__[0], help="a file or folder; default: memopt's own source")
parser.add_argument("--recipe", default="lora", choices=("lora", "qlora"))
parser.add_argument("--lr", type=float, default=3e-3, help="adapters of a small model bear more than the recipe's 2e-4")
parser.add_argument("--steps", type=int, default=200)
args = parser.parse_args()

torch.manual_seed(0)
config = ModelConfig(context=64, width=96, layers=3, heads=3)
corpus, model = Corpus(load_text(args.text), config.context), LanguageModel(config)
model.load_state_dict(torch.load(args.weights, weights_only=True))
before = validate(model, corpus, 0, 1)
model.requires_grad_(False)
for block in model.blocks:
    for name in ("qkv", "projection", "up", "down"):
        setattr(block, name, Adapted(getattr(block, name), rank=4, alpha=32))

run = memopt.recipe(args.recipe).build(model, lr=args.lr, total_steps=args.steps)
for step in range(1, args.steps + 1):
    model(corpus.batch(0, step, 16)).backward()
    run.step()

everything = memopt.price(LanguageModel(config), run.optimizer.spec).nbytes
print(f"validation loss {before:.3f} before, {validate(model, corpus, 0, 1):.3f} after")
print(f"{run.optimizer.ledger().nbytes:,} bytes of state; for all weights it would be {everything:,}")
