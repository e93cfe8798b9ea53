"""Predicted activations and peaks beside those of real training steps on the CPU.

    python benchmarks/estimates_activations.py [--minutes 10]

For every case a small model is built with transformers, one step warms up, then one forward pass runs under
saved_tensors_hooks (storages counted once) and one whole step runs with every allocation traced: forward, backward,
and an optimizer step of memopt's own. Writes ``benchmarks/results/estimates_activations.json`` and ``.md``; a run
goes on where one of the same commit ended.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from estimates_models import ADAPTED, FAMILIES, ONLY_EAGER, SIZES, Selective, build, checkpoint, config, inputs
from provenance import commit, write_result

import memopt
from estimators.calculator import estimate
from estimators.measure import saved, traced
from estimators.memory.memory_row import PHASES

SPEC = "adamw-8bit"
RANK = 8


def measure(
    family: str, size: int, dtype: str, attention: str, checkpointing: str, lora: bool, mixed: bool = False
) -> dict[str, Any]:
    """One case: predicted and real bytes. ``mixed``: fp32 weights under torch.autocast in bf16."""
    dims, batch, seq = SIZES[size]
    cfg, kind, rank = config(family, dims), getattr(torch, dtype), RANK * lora
    torch.manual_seed(0)
    model = build(dict(cfg), kind, attention, rank)
    selective = checkpoint(model, checkpointing) if checkpointing != "none" else Selective()
    given = inputs(cfg, batch, seq, kind)
    optimizer = memopt.create([p for p in model.parameters() if p.requires_grad], SPEC, lr=1e-4)
    box: dict[str, torch.Tensor] = {}

    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return model(**given).loss

    def forward() -> None:
        box["loss"] = run()

    def backward() -> None:
        box.pop("loss").backward()

    forward(), backward(), optimizer.step(), optimizer.zero_grad()
    selective.stores.clear()
    gc.collect()
    kept = saved(model, run, selective.kept).nbytes
    curve = traced(("forward", forward), ("backward", backward), ("step", optimizer.step))
    own = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    peak = curve.peak_of_tensors + sum({id(t): t.nbytes for t in given.values()}.values())
    held = sum(own.values()) + sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    e = estimate(
        cfg,
        SPEC,
        weights=dtype,
        batch=batch,
        seq=seq,
        attention=attention,
        lora=rank,
        device="cpu",
        mixed="bf16" if mixed else "",
        checkpointing=checkpointing,
    )
    if e.activations is None:
        raise SystemExit(f"{family}: {e.without}")
    predicted = max(sum(r.nbytes for r in e.rows if phase in r.phases) for phase in PHASES)
    return {
        "family": family,
        "size": size,
        "dtype": dtype,
        "attention": attention,
        "checkpointing": checkpointing,
        "lora": rank,
        "mixed": mixed,
        "saved_nbytes": kept,
        "saved_predicted": e.activations.saved,
        "saved_error": round(e.activations.saved / kept - 1, 6),
        "peak_nbytes": held + peak,
        "peak_predicted": predicted,
        "peak_error": round(predicted / (held + peak) - 1, 6),
        "moving_nbytes": peak,
        "moving_error": round((predicted - held) / peak - 1, 6),
        "scratch_nbytes": curve.peak - curve.peak_of_tensors,
    }


def cases() -> list[tuple[Any, ...]]:
    """Every family at both sizes and dtypes, without checkpointing and with each kind of it; eager attention, adapters
    and autocast for some."""
    from estimators.activations import MIXED, NOT_SELECTIVE

    both, hows = (0, 1), ("none", "full")
    listed: list[tuple[Any, ...]] = []
    for family in FAMILIES:
        attention = "eager" if family in ONLY_EAGER else "sdpa"
        listed += [
            (family, size, dtype, attention, how, False)
            for size in both
            for dtype in ("bfloat16", "float32")
            for how in hows
        ]
        more = ("every-2",) if family in NOT_SELECTIVE else ("selective", "every-2")
        listed += [(family, size, "bfloat16", attention, how, False) for size in both for how in more]
        if family in ADAPTED:
            listed += [(family, size, "bfloat16", attention, how, True) for size in both for how in hows]
        if family in MIXED:
            listed += [(family, 0, "float32", attention, how, False, True) for how in hows]
    for family in ("llama", "qwen2", "gpt_neox", "mistral", "t5"):
        listed += [(family, size, "bfloat16", "eager", how, False) for size in both for how in hows]
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    ended = time.monotonic() + 60 * parser.parse_args().minutes
    torch.set_num_threads(1)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    out = Path(__file__).parent / "results"
    before = json.loads((out / "estimates_activations.json").read_text())
    results = before["results"] if before["provenance"].get("commit") == commit() else []
    for case in cases()[len(results) :]:
        if time.monotonic() > ended:
            break
        results.append(measure(*case))
        gc.collect()  # a model is in cycles with its hooks
        print(len(results), *case, flush=True)
    worst = {
        key: max((abs(r[key]) for r in results), default=0.0) for key in ("saved_error", "peak_error", "moving_error")
    }
    import transformers

    header = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "spec": SPEC,
        "python": sys.version.split()[0],
        "cases": len(results),
        "of": len(cases()),
        "worst": worst,
    }
    write_result(out / "estimates_activations.json", {**header, "results": results})
    (out / "estimates_activations.md").write_text(table(results, header))
    print(worst)


def table(results: list[dict[str, Any]], header: dict[str, Any]) -> str:
    names = (
        "family",
        "size",
        "dtype",
        "attention",
        "checkpointing",
        "LoRA",
        "autocast",
        "saved, bytes",
        "error",
        "peak, bytes",
        "error",
        "moving",
        "scratch, bytes",
    )
    lines = [
        "# Activations and peaks: predicted beside measured",
        "",
        f"torch {header['torch']}, transformers {header['transformers']}, CPU, {SPEC}; {len(results)} cases.",
        "Errors are predicted over measured, less one. *Peak* is weights, state and every allocation of forward,",
        "backward and step; *moving* is the peak without weights and state. *Scratch* is how much higher the peak is",
        "with what convolutions and matrix products allocate and free inside of themselves (oneDNN's packed and",
        "reordered operands): a CPU's, and not estimated.",
        "",
        f"| {' | '.join(names)} |",
        "|---" * len(names) + "|",
    ]
    for r in results:
        lines.append(
            f"| {r['family']} | {r['size']} | {r['dtype']} | {r['attention']} | "
            f"{r['checkpointing']} | {r['lora'] or ''} | "
            f"{'bf16' if r['mixed'] else ''} | {r['saved_nbytes']:,} | "
            f"{r['saved_error']:+.2%} | {r['peak_nbytes']:,} | {r['peak_error']:+.2%} | "
            f"{r['moving_error']:+.2%} | {r.get('scratch_nbytes', 0) or ''} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
