"""Train a small language model on real text by a published recipe, and watch it.

python examples/recipe_pretrain.py llama-2-7b --optim adamw-8bit --lr 3e-3
python examples/recipe_pretrain.py palm-540b
"""

from argparse import ArgumentParser
from pathlib import Path

import torch

import memopt
from memopt.train.job import ModelConfig
from memopt.train.model import LanguageModel
from memopt.train.run import validate
from memopt.train.text import Corpus, load_text

parser = ArgumentParser()
parser.add_argument("recipe", nargs="?", default="llama-2-7b")
parser.add_argument("--optim", help="another spec than the recipe's")
parser.add_argument("--lr", type=float, help="another peak than the recipe's, which is for a model of its size")
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--text", help="a file or folder; without it, Python's language reference")
parser.add_argument("--save", type=Path, help="where to save the weights")
args = parser.parse_args()

torch.manual_seed(0)
config = ModelConfig(context=64, width=96, layers=3, heads=3)
corpus, model = Corpus(load_text(args.text), config.context), LanguageModel(config)

changes = {name: value for name, value in (("spec", args.optim), ("lr", args.lr)) if value is not None}
run = memopt.recipe(args.recipe).build(model, total_steps=args.steps, **changes)
print(run.recipe)
watch = memopt.watch(run.optimizer, every=100)
for step in range(1, args.steps + 1):
    loss = model(corpus.batch(0, step, 16))
    loss.backward()
    watch.loss(loss)
    run.step()

print(watch.report())
print(f"validation loss {validate(model, corpus, 0, 1):.3f}, {run.optimizer.ledger().nbytes:,} bytes of state")
if args.save:
    torch.save(model.state_dict(), args.save)
