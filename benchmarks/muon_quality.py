"""Muon against AdamW from scratch: the demo's language model, three seeds, Muon with 0.8 of AdamW's steps.

    python benchmarks/muon_quality.py       writes benchmarks/results/muon_quality.json and muon_quality.md

Each run has its own schedule over its own steps, the recipe's clipping and the rule's rate (LEARNING_RATE). The bar:
Muon's mean validation loss at 0.8 of the steps is at most AdamW's at all of them, and in 8 bits it is within the spread
of Muon's seeds.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

from provenance import write_result

from memopt.spec import parse
from memopt.train.job import Job
from memopt.train.launch import launch
from memopt.train.recipe import learning_rate

RESULTS = Path(__file__).parent / "results"
SHARE = 0.8
SEEDS = (0, 1, 2)
#: case -> spec, and the share of the steps.
CASES = {
    "adamw": ("adamw", 1.0),
    "muon": ("muon(adamw)", SHARE),
    "muon-8bit": ("muon-8bit(adamw)", SHARE),
    "adamw, 0.8 of the steps": ("adamw", SHARE),
}


def main() -> int:
    parser = ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()

    def one(name: str, seed: int) -> float:
        spec, share = CASES[name]
        steps = round(args.steps * share)
        lr = learning_rate(parse(spec).rule)
        job = Job(spec=spec, lr=lr, steps=steps, batch=args.batch, seed=seed, threads=1)
        loss = launch(job, lambda step, loss: None).validation_loss
        print(f"{name:<24}  seed {seed}  {loss:.4f}", flush=True)
        return loss

    with ThreadPoolExecutor(args.workers) as pool:
        running = {name: [pool.submit(one, name, seed) for seed in SEEDS] for name in CASES}
        losses = {name: [future.result() for future in found] for name, found in running.items()}
    rows = {name: {"losses": found, "mean": mean(found), "stdev": stdev(found)} for name, found in losses.items()}
    gap = abs(rows["muon-8bit"]["mean"] - rows["muon"]["mean"])
    within = {"muon": rows["muon"]["mean"] <= rows["adamw"]["mean"], "8 bits": gap <= rows["muon"]["stdev"]}
    result = {"steps": args.steps, "batch": args.batch, "share": SHARE, "rows": rows, "within": within}
    write_result(RESULTS / "muon_quality.json", result)
    lines = ["| | steps | validation loss, mean of three seeds | spread |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {round(args.steps * CASES[name][1])} | {row['mean']:.4f} | {row['stdev']:.4f} |"
        for name, row in rows.items()
    ]
    (RESULTS / "muon_quality.md").write_text("\n".join(lines) + "\n")
    print(within)
    return int(not all(within.values()))


if __name__ == "__main__":
    sys.exit(main())
