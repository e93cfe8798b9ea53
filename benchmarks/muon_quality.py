"""Muon against AdamW from scratch: the demo's language model, three seeds, Muon with 0.8 of AdamW's steps.

    python benchmarks/muon_quality.py            writes benchmarks/results/muon_quality.json and muon_quality.md
    python benchmarks/muon_quality.py --seeds 1  the runs of one seed; those that the file has already are not repeated

Each run has its own schedule over its own steps, the recipe's clipping and the rule's rate (memopt/train/recipe.py,
found with seeds that are not judged here). The bar: Muon's mean validation loss at 0.8 of the steps is at most AdamW's
at all of them, and in 8 bits it is within the spread of Muon's seeds.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

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


def run(name: str, seed: int, steps: int, batch: int, lr: float | None = None) -> float:
    spec, share = CASES[name]
    rate = learning_rate(parse(spec).rule) if lr is None else lr
    job = Job(spec=spec, lr=rate, steps=round(steps * share), batch=batch, seed=seed, threads=1)
    loss = launch(job, lambda step, loss: None).validation_loss
    print(f"{name:<24}  seed {seed}  lr {rate:g}  {loss:.4f}", flush=True)
    return loss


def main() -> int:
    parser = ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument(
        "--rates", type=float, nargs="*", help="Muon's with these rates on the first of --seeds, no file"
    )
    args = parser.parse_args()
    if args.rates:
        for rate in args.rates:
            run("muon", args.seeds[0], args.steps, args.batch, rate)
        return 0
    path, settings = RESULTS / "muon_quality.json", {"steps": args.steps, "batch": args.batch, "share": SHARE}
    found: dict[str, dict[str, float]] = {}
    if path.exists():
        before = json.loads(path.read_text())
        found = before.get("losses", {}) if {k: before.get(k) for k in settings} == settings else {}
    with ThreadPoolExecutor(args.workers) as pool:
        wanted = [(name, seed) for seed in args.seeds for name in CASES if str(seed) not in found.get(name, {})]
        running = {one: pool.submit(run, *one, args.steps, args.batch) for one in wanted}
        for (name, seed), future in running.items():
            found.setdefault(name, {})[str(seed)] = future.result()
            write_result(path, {**settings, "losses": found})
    if any(str(seed) not in found[name] for name in CASES for seed in SEEDS):
        print("not all seeds have run yet")
        return 0
    rows = {name: [found[name][str(seed)] for seed in SEEDS] for name in CASES}
    means, spreads = {k: mean(v) for k, v in rows.items()}, {k: stdev(v) for k, v in rows.items()}
    gap = abs(means["muon-8bit"] - means["muon"])
    within = {"muon": means["muon"] <= means["adamw"], "8 bits": gap <= spreads["muon"]}
    write_result(path, {**settings, "losses": found, "means": means, "spreads": spreads, "within": within})
    (RESULTS / "muon_quality.md").write_text(page(args.steps, rows, means, spreads))
    print(within)
    return int(not all(within.values()))


def page(steps: int, rows: dict[str, Any], means: dict[str, float], spreads: dict[str, float]) -> str:
    lines = ["| | steps | validation loss, mean of three seeds | spread |", "|---|---|---|---|"]
    for name in rows:
        lines.append(f"| {name} | {round(steps * CASES[name][1])} | {means[name]:.4f} | {spreads[name]:.4f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
