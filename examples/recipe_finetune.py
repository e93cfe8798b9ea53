"""Fine-tune what recipe_pretrain.py saved on another text: groups, a rate for the head, bf16 weights that still learn.

python examples/recipe_finetune.py model.pt --text notes/
python examples/recipe_finetune.py model.pt --text notes/ --dtype bfloat16 --optim adamw-8bit+kahan --lr 1e-5
"""

from argparse import ArgumentParser

import torch

import memopt
from memopt.train.job import ModelConfig
from memopt.train.model import LanguageModel
from memopt.train.run import validate
from memopt.train.text import Corpus, load_text

parser = ArgumentParser()
parser.add_argument("weights")
parser.add_argument("--text", default=memopt.__path__[0], help="a file or folder; default: memopt's own source")
parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
parser.add_argument("--optim", default="adamw-8bit")
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--steps", type=int, default=200)
args = parser.parse_args()

torch.manual_seed(0)
config = ModelConfig(context=64, width=96, layers=3, heads=3)
corpus, model = Corpus(load_text(args.text), config.context), LanguageModel(config)
model.load_state_dict(torch.load(args.weights, weights_only=True))
model.to(getattr(torch, args.dtype))
before = validate(model, corpus, 0, 1)

# BERT's recipe with decreasing rates towards the first layers, and a higher one for the norm before the head.
run = memopt.recipe("bert-finetune").build(
    model, spec=args.optim, lr=args.lr, total_steps=args.steps, layerwise_decay=0.9, rates={"norm.*": 2 * args.lr}
)
print(memopt.describe(run.optimizer))
watch = memopt.watch(run.optimizer, every=100)
for step in range(1, args.steps + 1):
    loss = model(corpus.batch(0, step, 16))
    loss.backward()
    watch.loss(loss)
    run.step()

print(watch.report())
print(f"validation loss {before:.3f} before, {validate(model, corpus, 0, 1):.3f} after")
