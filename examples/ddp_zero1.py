"""DistributedDataParallel averages the gradients, ``/zero1`` cuts the optimizer state over the same ranks.

torchrun --standalone --nproc-per-node 2 examples/ddp_zero1.py
"""

from argparse import ArgumentParser
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch import nn

import memopt

CONTEXT, BATCH = 16, 64

parser = ArgumentParser()
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--optim", default="adamw-8bit/zero1")
args = parser.parse_args()

dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)
text = torch.tensor(list("\n".join(topics.values()).encode()))
model = nn.Sequential(nn.Embedding(256, 64), nn.Flatten(), nn.Linear(64 * CONTEXT, 512), nn.GELU(), nn.Linear(512, 256))
replica = nn.parallel.DistributedDataParallel(model)
optimizer = memopt.create(model, args.optim, lr=1e-3)

batches = torch.Generator().manual_seed(rank)  # every rank draws windows of its own
for _ in range(args.steps):
    starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=batches)
    windows = text[starts[:, None] + torch.arange(CONTEXT + 1)]
    loss = nn.functional.cross_entropy(replica(windows[:, :-1]), windows[:, -1])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

whole = memopt.price(model, args.optim).nbytes
mine = optimizer.ledger().nbytes
print(f"rank {rank} of {world_size}: loss {loss.item():.4f}, {mine:,} of {whole:,} bytes of state", flush=True)
dist.destroy_process_group()
