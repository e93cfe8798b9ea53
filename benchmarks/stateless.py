"""From sixteen bytes of state a parameter to none: what each costs, and what is given up for it.

    python benchmarks/stateless.py --write                      benchmarks/results/stateless.json and stateless.md
    python benchmarks/stateless.py --write --only time          the steps alone, of all rows, in one run
    python benchmarks/stateless.py --write --only loss --rows adamw "sinkgd(adamw)"

For each rule: the bytes of its whole state on Llama-3.1-8B, by price; the validation loss of the demo's language model
at the best of three rates, mean and spread of three seeds; and a step of 16.8 million parameters in matrices against a
step of torch's fused AdamW on the same gradients, interleaved, medians of wall and of processor time. What a rule of
matrices does not take is AdamW's at AdamW's own rate. The bars: sinkgd at most 1.2 times torch's fused AdamW,
prodigy-8bit 1.5. Of sinkgd the roof is measured too: it reads the gradient once in each of its five iterations, and
then steps as SGD does.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from provenance import write_result
from torch import nn

import estimators
import memopt
from memopt.train.job import ModelConfig
from memopt.train.model import LanguageModel
from memopt.train.recipe import CLIP_NORM, LEARNING_RATE, warmup_and_cosine
from memopt.train.run import validate
from memopt.train.text import Corpus, load_text

RESULTS = Path(__file__).parent / "results"
MODEL = "llama-3.1-8b"
#: Spec -> hyperparameters and the three rates; the middle one is the demo's (memopt/train/recipe.py) where it has one.
ROWS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "adamw": ({}, (5e-4, 1e-3, 2e-3)),
    "adamw-8bit": ({}, (5e-4, 1e-3, 2e-3)),
    "lion-8bit": ({}, (3e-4, 6e-4, 1.2e-3)),
    "adafactor": ({}, (5e-4, 1e-3, 2e-3)),
    "muon-8bit(adamw)": ({}, (1e-3, 2e-3, 4e-3)),
    "prodigy-8bit": ({}, (0.5, 1.0, 2.0)),
    "prodigy-8bit, sliced": ({"sliced": True}, (0.5, 1.0, 2.0)),
    "scale(adamw)": ({}, (5e-4, 1e-3, 2e-3)),
    "scale-8bit(adamw)": ({}, (5e-4, 1e-3, 2e-3)),
    "sinkgd(adamw)": ({}, (1.25e-4, 2.5e-4, 5e-4)),
    "sinkgd-8bit(adamw)": ({}, (1.25e-4, 2.5e-4, 5e-4)),
    "sinkgd-8bit(adamw), spectral norm": ({"spectral_steps": 5}, (1e-2, 2e-2, 4e-2)),
    "apollo(adamw)": ({}, (2.5e-3, 5e-3, 1e-2)),
    "apollo-8bit(adamw)": ({}, (2.5e-3, 5e-3, 1e-2)),
    "apollomini(adamw)": ({}, (5e-3, 1e-2, 2e-2)),
}
#: Of the demo's model alone, whose matrices are 160 wide: a quarter of that, as the paper has it.
DEMO: dict[str, dict[str, Any]] = {row: {"projection_rank": 40} for row in ("apollo(adamw)", "apollo-8bit(adamw)")}
BARS = {"sinkgd(adamw)": 1.2, "prodigy-8bit": 1.5}
#: Of the rows of times: nothing but the reads and writes that sinkgd cannot do without.
ROOF = "five reads and SGD"


class Roof:
    """As long as it takes to read each gradient five times, one after the other, and to step as SGD does."""

    def __init__(self, named: list[tuple[str, nn.Parameter]]) -> None:
        self.gradients = [p.grad.view(-1) for _, p in named if p.grad is not None]
        self.sgd = torch.optim.SGD([p for _, p in named], 1e-3, fused=True)

    def step(self) -> None:
        for g in self.gradients:
            for _ in range(5):
                torch.dot(g, g)
        self.sgd.step()


def spec_of(row: str) -> str:
    return row.partition(",")[0]


def loss_of(row: str, lr: float, seed: int, steps: int, batch: int, corpus: Corpus) -> float:
    torch.manual_seed(seed)
    model = LanguageModel(ModelConfig())
    hyper = {**ROWS[row][0], **DEMO.get(row, {})}
    spec = memopt.parse(spec_of(row))
    rules = {"adamw": {"lr": LEARNING_RATE["adamw"]}} if spec.fallback else {}
    opt = memopt.create(model, spec, lr=lr, rules=rules, **hyper)
    scheduler = warmup_and_cosine(opt, steps)
    for step in range(1, steps + 1):
        model(corpus.batch(seed, step, batch)).backward()
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
    made[ROOF] = Roof(matrices())
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
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3, help="of the best rate; the others are of one")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("loss", "time"))
    parser.add_argument("--write", action="store_true", help="these rows into the file, beside those that it has")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    args = parser.parse_args()
    shapes = dict(estimators.resolve(MODEL).shapes)
    numel = sum(torch.Size(shape).numel() for shape in shapes.values())
    path, settings = RESULTS / "stateless.json", {"steps": args.steps, "batch": args.batch, "seeds": args.seeds}
    before = json.loads(path.read_text()) if path.exists() else {}
    rows = before.get("rows", {}) if {key: before.get(key) for key in settings} == settings else {}
    times = step_times(args.rounds, args.rows) if args.only != "loss" else {}
    corpus = Corpus(load_text(None), ModelConfig().context)
    for row in args.rows:
        hyper, rates = ROWS[row]
        nbytes = memopt.price(shapes, spec_of(row), **hyper).nbytes
        rows.setdefault(row, {}).update({"nbytes": nbytes, "per_parameter": nbytes / numel, **times.get(row, {})})
        if args.only != "time":
            losses = {lr: loss_of(row, lr, 0, args.steps, args.batch, corpus) for lr in rates}
            best = min(losses, key=losses.__getitem__)
            others = [loss_of(row, best, seed, args.steps, args.batch, corpus) for seed in range(1, args.seeds)]
            rows[row] |= {"losses": {str(lr): loss for lr, loss in losses.items()}, "rate": best}
            rows[row]["seeds"] = [losses[best], *others]
        print(f"{row:<40}", {k: v for k, v in rows[row].items() if k != "nbytes"}, flush=True)
        if args.write:
            roof = {"roof": times.get(ROOF, before.get("roof"))}
            result = {**settings, "threads": torch.get_num_threads(), "bars": BARS, **roof, "rows": rows}
            write_result(path, result)
    if args.write and all({"seeds", "wall"} <= rows.get(row, {}).keys() for row in ROWS):
        (RESULTS / "stateless.md").write_text(page(result))
    late = [row for row, bar in BARS.items() if row in times and times[row]["wall"] > bar]
    return len(late)


def page(result: dict[str, Any]) -> str:
    lines = [
        f"| | state of {MODEL}, bytes a parameter | GB | validation loss, best of three rates | spread | rate "
        "| step, of torch's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        one = result["rows"][row]
        lines.append(
            f"| {row} | {one['per_parameter']:.3f} | {one['nbytes'] / 1e9:.2f} | {mean(one['seeds']):.4f} "
            f"| {stdev(one['seeds']):.4f} | {one['rate']:g} | {one['wall']:.2f} |"
        )
    roof = result["roof"]
    if roof:
        lines += [
            "",
            f"Five reads of the gradient and a step of SGD, alone: {roof['wall']:.2f} of torch's fused AdamW.",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
