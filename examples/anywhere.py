"""One training script; the launcher and the spec say on how many processes and what is sharded.

python examples/anywhere.py --optim adamw-8bit
torchrun --standalone --nproc-per-node 2 examples/anywhere.py --optim adamw-8bit/zero1      DistributedDataParallel
torchrun --standalone --nproc-per-node 2 examples/anywhere.py --optim adamw-8bit/zero3      FSDP2
torchrun --standalone --nproc-per-node 2 examples/anywhere.py --with accelerate             DistributedDataParallel
torchrun --standalone --nproc-per-node 2 examples/anywhere.py --with deepspeed --optim adamw-8bit/zero2 --offload

On a machine without a GPU DeepSpeed needs DS_ACCELERATOR=cpu. All print the same losses, to the last digits of fp32 or
of 8-bit codes.
"""

import gc
import os
from argparse import ArgumentParser
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch import nn

import memopt

CONTEXT, BATCH = 16, 64

parser = ArgumentParser()
parser.add_argument("--optim", default="adamw-8bit")
parser.add_argument("--with", dest="framework", choices=("torch", "accelerate", "deepspeed"), default="torch")
parser.add_argument("--offload", action="store_true", help="DeepSpeed: state and step on the host")
parser.add_argument("--steps", type=int, default=200)
args = parser.parse_args()

rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
if world_size > 1:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

torch.manual_seed(0)
text = torch.tensor(list("\n".join(topics.values()).encode()))
model: nn.Module = nn.Sequential(
    nn.Embedding(256, 64), nn.Flatten(), nn.Linear(64 * CONTEXT, 512), nn.GELU(), nn.Linear(512, 256)
)


def prepared():
    """``(model, backward, step)`` of the framework, and the optimizer."""
    spec = memopt.parse(args.optim)
    if args.framework == "deepspeed":
        import deepspeed

        config = memopt.deepspeed_config(spec, micro_batch=BATCH // world_size, offload=args.offload)
        optimizer = memopt.create(model, spec.replace(partition="none"), lr=1e-3)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        return engine, engine.backward, engine.step, optimizer
    if args.framework == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=not torch.cuda.is_available())
        optimizer = memopt.create(model, spec, lr=1e-3)
        net, stepper = accelerator.prepare(model, optimizer)
        return net, accelerator.backward, lambda: (stepper.step(), stepper.zero_grad()), optimizer
    net = model
    if spec.partition in ("zero2", "zero3"):
        memopt.shard(model, spec)
    elif world_size > 1:
        net = nn.parallel.DistributedDataParallel(model)
    optimizer = memopt.create(model, spec, lr=1e-3)
    return net, torch.Tensor.backward, lambda: (optimizer.step(), optimizer.zero_grad()), optimizer


net, backward, step, optimizer = prepared()
draws = torch.Generator().manual_seed(0)
for _ in range(args.steps):
    starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=draws).chunk(world_size)[rank]
    windows = text[starts[:, None] + torch.arange(CONTEXT + 1)]
    loss = nn.functional.cross_entropy(net(windows[:, :-1]), windows[:, -1])
    backward(loss)
    step()

mean = loss.detach().clone()
if world_size > 1:
    dist.all_reduce(mean)
print(f"rank {rank} of {world_size}: loss {mean.item() / world_size:.4f}, {optimizer.ledger().nbytes:,} bytes of state")
if world_size > 1:
    # Whoever holds the process group lets go of it first: gloo's threads abort a process that ends with them.
    del net, model, backward, step, optimizer, loss
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
