"""Train on text with optimizer state that is larger than the memory this process may have.

python examples/offload.py --limit 900MiB --until 6 --directory run     # 1 GiB of AdamW state, in files
python examples/offload.py --limit 900MiB --until 12 --directory run    # goes on, with the state that is there
python examples/offload.py --spec adamw@host --device cuda              # the same on a card, state in host memory

The limit is enforced from outside: the training runs in a child, which is killed when its resident memory goes over it.
The model predicts the next byte from hashed n-grams: large tables, as embeddings are, and little arithmetic.
"""

import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from pydoc_data.topics import topics

CONTEXT, BATCH, BUCKETS, WIDTH = 8, 128, 1 << 16, 256


def train(args) -> None:
    import psutil
    import torch
    from torch import nn

    import memopt

    torch.manual_seed(0)
    text = torch.tensor(list("\n".join(topics.values()).encode()))

    class NGrams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(BUCKETS, WIDTH, dtype=torch.bfloat16) for _ in range(CONTEXT))
            self.head = nn.Sequential(nn.Linear(WIDTH * CONTEXT, 512), nn.GELU(), nn.Linear(512, 256)).bfloat16()

        def forward(self, window):
            grams, found = torch.zeros_like(window[:, 0]), []
            for i, table in enumerate(self.tables):  # of one byte, of two, … of eight
                grams = (grams * 1000003 + window[:, -1 - i] + 1) % 2147483647
                found.append(table(grams % BUCKETS))
            return self.head(torch.cat(found, 1)).float()

    model = NGrams().to(args.device)
    options = {"directory": args.directory / "state"} if args.directory and "@disk" in args.spec else {}
    optimizer = memopt.create(model, args.spec, lr=1e-3, **options)
    optimizer.init_state()
    step = int(max(state["step"] for state in optimizer.state.values()))
    if step:
        memopt.load(args.directory / f"{step}", model=model)
        print(f"going on at step {step}", flush=True)
    optimizer.release_gradients(model)  # each gradient is freed as soon as it has been used
    while step < args.until:
        starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=torch.Generator().manual_seed(step))
        window = text[starts[:, None] + torch.arange(CONTEXT + 1)].to(args.device)
        loss = nn.functional.cross_entropy(model(window[:, :-1]), window[:, -1])
        loss.backward()
        optimizer.step()
        step += 1
        resident = psutil.Process().memory_info().rss / 2**20
        print(f"step {step}: loss {loss.item():.4f}, {resident:.0f} MiB resident", flush=True)
        if options:
            memopt.save(args.directory / f"{step}", model=model)  # the state is in its files already
            shutil.rmtree(args.directory / f"{step - 2}", ignore_errors=True)
    print(optimizer.ledger())


def watch(limit: int) -> int:
    """Run this script again as a child and kill it when it takes more than ``limit`` bytes of memory."""
    import psutil

    child = subprocess.Popen([sys.executable, *sys.argv, "--inside"])
    process, peak = psutil.Process(child.pid), 0
    while child.poll() is None:
        try:
            peak = max(peak, process.memory_info().rss)
        except psutil.Error:
            break
        if peak > limit:
            child.kill()
            sys.exit(f"killed: {peak:,} bytes resident, {limit:,} allowed")
        time.sleep(0.02)
    print(f"peak resident memory {peak / 2**20:.0f} MiB of {limit / 2**20:.0f} MiB allowed")
    return child.wait()


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--spec", default="adamw@disk")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--until", type=int, default=6)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--limit", help="bytes of resident memory, as 1GiB")
    parser.add_argument("--inside", action="store_true")
    arguments = parser.parse_args()
    if arguments.limit and not arguments.inside:
        from memopt.spec.placement_options import size

        sys.exit(watch(size(arguments.limit, "limit")))
    if arguments.directory:
        arguments.directory.mkdir(parents=True, exist_ok=True)
    train(arguments)
