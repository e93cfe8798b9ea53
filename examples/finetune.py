"""Train with 8-bit optimizer state, stop, and go on as if nothing had happened.

python examples/finetune.py --until 200 --checkpoint run.pt
python examples/finetune.py --until 400 --checkpoint run.pt     # goes on at step 200
"""

from argparse import ArgumentParser
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import nn

import memopt

CONTEXT, BATCH = 16, 64

parser = ArgumentParser()
parser.add_argument("--until", type=int, default=200)
parser.add_argument("--checkpoint", type=Path)
args = parser.parse_args()

torch.manual_seed(0)
text = torch.tensor(list("\n".join(topics.values()).encode()))
# The next byte from the sixteen before it.
model = nn.Sequential(nn.Embedding(256, 64), nn.Flatten(), nn.Linear(64 * CONTEXT, 512), nn.GELU(), nn.Linear(512, 256))
optimizer = memopt.create(model, "adamw-8bit", lr=1e-3)

step = 0
if args.checkpoint and args.checkpoint.exists():
    saved = torch.load(args.checkpoint, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    step = saved["step"]
    print(f"going on at step {step}")

while step < args.until:
    starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=torch.Generator().manual_seed(step))
    windows = text[starts[:, None] + torch.arange(CONTEXT + 1)]
    loss = nn.functional.cross_entropy(model(windows[:, :-1]), windows[:, -1])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    step += 1

print(f"step {step}: loss {loss.item():.6f}, {optimizer.ledger().nbytes:,} bytes of state")
if args.checkpoint:
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, args.checkpoint)
