"""From sixteen bytes of state a parameter to none: what each costs, and what is given up for it.

    python benchmarks/stateless.py          writes benchmarks/results/stateless.json and stateless.md

For each rule: the bytes of its whole state on Llama-3.1-8B, by price; the validation loss of the demo's language model
at the best of three rates, one seed; and a step of 16.8 million parameters in matrices against a step of torch's fused
AdamW on the same gradients, interleaved, medians of wall and of processor time. What a rule of matrices does not take
is AdamW's at AdamW's own rate. The bars: sinkgd at most 1.2 times torch's fused AdamW, prodigy-8bit 1.5.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from statistics import median
from typing import Any

import torch
from provenance import write_result
from torch import nn

import estimators
import memopt
from memopt.train.job import ModelConfig
from memopt.train.model import LanguageModel
from memopt.train.recipe import CLIP_NORM, LEARNING_RATE, schedule
from memopt.train.run import validate
from memopt.train.text import Corpus, load_text

RESULTS = Path(__file__).parent / "results"
MODEL = "llama-3.1-8b"
#: Spec -> hyperparameters and the three rates; the middle one is the demo's (memopt/train/recipe.py) where it has one.
ROWS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "adamw": ({}, (1e-3, 2e-3, 4e-3)),
    "adamw-8bit": ({}, (1e-3, 2e-3, 4e-3)),
    "lion-8bit": ({}, (3e-4, 6e-4, 1.2e-3)),
    "adafactor": ({}, (1e-3, 2e-3, 4e-3)),
    "muon-8bit(adamw)": ({}, (1e-3, 2e-3, 4e-3)),
    "prodigy-8bit": ({}, (0.5, 1.0, 2.0)),
    "prodigy-8bit, sliced": ({"sliced": True}, (0.5, 1.0, 2.0)),
    "scale(adamw)": ({}, (2.5e-4, 5e-4, 1e-3)),
    "scale-8bit(adamw)": ({}, (2.5e-4, 5e-4, 1e-3)),
    "sinkgd(adamw)": ({}, (2.5e-4, 5e-4, 1e-3)),
    "sinkgd-8bit(adamw)": ({}, (2.5e-4, 5e-4, 1e-3)),
    "sinkgd-8bit(adamw), spectral norm": ({"spectral_steps": 5}, (5e-3, 1e-2, 2e-2)),
}
BARS = {"sinkgd(adamw)": 1.2, "prodigy-8bit": 1.5}


def spec_of(row: str) -> str:
    return row.partition(",")[0]


def loss_of(row: str, lr: float, steps: int, batch: int, corpus: Corpus) -> float:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig())
    hyper = ROWS[row][0]
    spec = memopt.parse(spec_of(row))
    rules = {"adamw": {"lr": LEARNING_RATE["adamw"]}} if spec.fallback else {}
    opt = memopt.create(model, spec, lr=lr, rules=rules, **hyper)
    scheduler = schedule(opt, steps)
    for step in range(1, steps + 1):
        model(corpus.batch(0, step, batch)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        opt.step()
        scheduler.step()
        opt.zero_grad()
    return validate(model, corpus, 0, 1)


def matrices() -> list[tuple[str, nn.Parameter]]:
    g = torch.Generator().manual_seed(0)
    named = []
    for i in range(4):
        p = nn.Parameter(torch.randn(2048, 2048, generator=g) / 32)
        p.grad = torch.randn(2048, 2048, generator=g)
        named.append((f"w{i}", p))
    return named


def step_times(rounds: int, rows: list[str]) -> dict[str, dict[str, float]]:
    """Medians of the ratios to torch's step of the same round."""
    named = matrices()
    made: dict[str, Any] = {"torch": torch.optim.AdamW([p for _, p in named], fused=True)}
    for row in rows:
        named = matrices()
        made[row] = memopt.create(named, spec_of(row), **ROWS[row][0])
    found: dict[str, dict[str, list[float]]] = {row: {"wall": [], "cpu": []} for row in made}
    for _ in range(rounds + 1):
        for row, opt in made.items():
            wall, cpu = time.perf_counter(), time.process_time()
            opt.step()
            found[row]["wall"].append(time.perf_counter() - wall)
            found[row]["cpu"].append(time.process_time() - cpu)
    torchs = found["torch"]
    return {
        row: {
            kind: median(a / b for a, b in zip(times[1:], torchs[kind][1:], strict=True))
            for kind, times in both.items()
        }
        | {"seconds": median(both["wall"][1:])}
        for row, both in found.items()
    }


def main() -> int:
    parser = ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("loss", "time"))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    args = parser.parse_args()
    shapes = dict(estimators.resolve(MODEL).shapes)
    numel = sum(torch.Size(shape).numel() for shape in shapes.values())
    times = step_times(args.rounds, args.rows) if args.only != "loss" else {}
    corpus = Corpus(load_text(None), ModelConfig().context)
    rows: dict[str, Any] = {}
    for row in args.rows:
        hyper, rates = ROWS[row]
        losses = {}
        for lr in rates if args.only != "time" else ():
            losses[lr] = loss_of(row, lr, args.steps, args.batch, corpus)
        nbytes = memopt.price(shapes, spec_of(row), **hyper).nbytes
        rows[row] = {"nbytes": nbytes, "per_parameter": nbytes / numel, "losses": losses, **times.get(row, {})}
        print(f"{row:<40}", {k: v for k, v in rows[row].items() if k != "nbytes"}, flush=True)
    late = [row for row, bar in BARS.items() if row in times and times[row]["wall"] > bar]
    if args.only or args.rows != list(ROWS):
        return len(late)
    result = {"steps": args.steps, "batch": args.batch, "threads": torch.get_num_threads(), "bars": BARS, "rows": rows}
    write_result(RESULTS / "stateless.json", result)
    lines = [
        f"| | state of {MODEL}, bytes a parameter | GB | validation loss, best of three rates | rate "
        "| step, of torch's |",
        "|---|---|---|---|---|---|",
    ]
    for row, one in rows.items():
        best = min(one["losses"], key=one["losses"].get)
        lines.append(
            f"| {row} | {one['per_parameter']:.3f} | {one['nbytes'] / 1e9:.2f} | {one['losses'][best]:.4f} | {best:g} "
            f"| {one['wall']:.2f} |"
        )
    (RESULTS / "stateless.md").write_text("\n".join(lines) + "\n")
    return len(late)


if __name__ == "__main__":
    sys.exit(main())
