"""The experiment of DeepSpeed #8463, with memopt's Muon: a Qwen-like language model for some steps, alone and under
DeepSpeed's stages 1 to 3, with and without offload to the CPU. There CPU offload put the losses off by up to 9.4e-2.

    python benchmarks/muon_deepspeed.py      writes benchmarks/results/muon_deepspeed.json and .md (some minutes)

The model is transformers' Qwen2 with random first weights, the data is text; every rank has its own part of each batch,
and the losses are those of the whole batch before the step. fp32, and products in fp32, so that what is left is the
order of sums. The bar: the largest difference of a loss from those of one process without DeepSpeed is at most 1e-3.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
from provenance import write_result

import memopt
from memopt.train.text import Corpus, load_text
from tests.helpers import ranks

RESULTS = Path(__file__).parent / "results"
BAR = 1e-3
SPEC, HYPER = "muon(adamw)", {"lr": 2e-3, "ns_dtype": "float32"}
WAYS = [(1, False), (1, True), (2, False), (2, True), (3, False), (3, True)]
CONTEXT, BATCH = 32, 4


def model() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return Qwen2ForCausalLM(config)


def batch(corpus: Corpus, step: int, rank: int, world: int) -> torch.Tensor:
    return corpus.batch(0, step, BATCH).chunk(world)[rank]


def alone(steps: int) -> list[float]:
    net, corpus, losses = model(), Corpus(load_text(), CONTEXT), []
    opt = memopt.create(net, SPEC, **HYPER)
    for step in range(steps):
        tokens = batch(corpus, step, 0, 1)
        loss = net(input_ids=tokens, labels=tokens).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def under_deepspeed(steps: int) -> dict[Any, list[float]]:
    """The mean losses of all ranks, of each stage, with and without offload."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=os.environ["RANK"], LOCAL_SIZE=os.environ["WORLD_SIZE"])
    import deepspeed

    rank, world = dist.get_rank(), dist.get_world_size()
    corpus, found = Corpus(load_text(), CONTEXT), {}
    for stage, offload in WAYS:
        net = model()
        config = memopt.deepspeed_config(f"adamw/zero{stage}", offload=offload, micro_batch=BATCH // world)
        opt = memopt.create(net, SPEC, **HYPER)
        engine, *_ = deepspeed.initialize(model=net, optimizer=opt, config=config, dist_init_required=False)
        memopt.integrations.deepspeed.check_engine(engine)
        losses = []
        for step in range(steps):
            tokens = batch(corpus, step, rank, world)
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
            mean = loss.detach().clone() / world
            dist.all_reduce(mean)
            losses.append(float(mean))
        found[stage, offload] = losses
        engine.destroy()
    return found


def main() -> int:
    parser = ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--worlds", type=int, nargs="*", default=[1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    expected = alone(args.steps)
    rows = []
    for world in args.worlds:
        for (stage, offload), losses in ranks.run(under_deepspeed, world, args.steps)[0].items():
            off = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
            row = {
                "stage": stage,
                "offload": offload,
                "ranks": world,
                "first": losses[0],
                "last": losses[-1],
                "off": off,
            }
            rows.append(row)
            print(row, flush=True)
    within = all(row["off"] <= BAR for row in rows)
    alone_row = {"first": expected[0], "last": expected[-1]}
    write_result(RESULTS / "muon_deepspeed.json", {"steps": args.steps, "bar": BAR, "alone": alone_row, "rows": rows})
    lines = [
        "| | first loss | last loss | largest difference |",
        "|---|---|---|---|",
        f"| one process | {expected[0]:.6f} | {expected[-1]:.6f} | |",
    ]
    for row in rows:
        name = f"stage {row['stage']}{', offload' * row['offload']}, {row['ranks']} rank{'s' * (row['ranks'] > 1)}"
        lines.append(f"| {name} | {row['first']:.6f} | {row['last']:.6f} | {row['off']:.1e} |")
    (RESULTS / "muon_deepspeed.md").write_text("\n".join(lines) + "\n")
    print({"within": within})
    return int(not within)


if __name__ == "__main__":
    sys.exit(main())
