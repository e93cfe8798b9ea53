"""Does training notice that its optimizer changed formats in the middle?

    python benchmarks/checkpoint_training.py --out benchmarks/results/checkpoint_training.json

The language model of the demo is trained with AdamW; a run is converted in place half way, the others never. The bar:
the validation loss of a run converted from 32 to 8 bits is within 1 % of never converting.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from provenance import write_result
from torch import nn

import memopt
from memopt.train.job import ModelConfig
from memopt.train.model import LanguageModel
from memopt.train.recipe import CLIP_NORM, LEARNING_RATE, warmup_and_cosine
from memopt.train.run import validate
from memopt.train.text import Corpus, load_text

#: spec to begin with -> what it becomes, half way and at three quarters.
PATHS = {
    "never converted": (),
    "adamw, to 8 bits": ("adamw-8bit",),
    "adamw, to 8 bits and back": ("adamw-8bit", "adamw"),
    "adamw, to bf16": ("adamw-bf16",),
    "adamw, to fp8": ("adamw-fp8",),
    "adamw, to 4 bits": ("adamw-4bit",),
    "adamw, to factored": ("adamw-factored",),
}


def train(specs: tuple[str, ...], corpus: Corpus, steps: int, batch: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = LanguageModel(ModelConfig())
    optimizer = memopt.create(model, "adamw", lr=LEARNING_RATE["adamw"], seed=seed)
    scheduler = warmup_and_cosine(optimizer, steps)
    changes = dict(zip((steps // 2, 3 * steps // 4), specs, strict=False))
    errors = {}
    for step in range(1, steps + 1):
        loss = model(corpus.batch(seed, step, batch))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step in changes:
            errors[changes[step]] = optimizer.convert_(changes[step]).relative_error
    return {"validation_loss": validate(model, corpus, 0, 1), "relative_error": errors}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    corpus = Corpus(load_text(None), ModelConfig().context)
    results: dict[str, Any] = {"steps": args.steps, "batch": args.batch, "runs": []}
    for seed in range(args.seeds):
        base = None
        for name, specs in PATHS.items():
            run = train(specs, corpus, args.steps, args.batch, seed)
            base = base or run["validation_loss"]
            run = {"run": name, "seed": seed, **run, "against_never": run["validation_loss"] / base - 1}
            results["runs"].append(run)
            print(json.dumps(run), flush=True)
    if args.out:
        write_result(args.out, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
