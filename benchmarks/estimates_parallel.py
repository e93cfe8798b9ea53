"""Estimates under tensor, pipeline and context parallelism, beside torchtitan's published tables and Megatron-LM's own
formula.

    python benchmarks/estimates_parallel.py [--write]

``benchmarks/measured/torchtitan_parallel.csv`` has every row of the six tables: Llama 3.1 on 8 to 512 H100. Nothing
was fitted to them. Two things that they do not say are taken from torchtitan's code of that time: a pipeline has as
many micro-batches as stages, and its weights stay gathered (``/zero2``). Megatron's formula
(``megatron/training/theoretical_memory_usage.py``) is written down here as its source has it, and asked about two of
its own examples. Needs no torch and no GPU; ``--write`` writes ``benchmarks/results/estimates_parallel.json`` and
``.md``.
"""

from __future__ import annotations

import csv
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from provenance import write_result

from estimators import estimate
from estimators.models.published import published

HERE = Path(__file__).parent
GIB = 2**30

#: Megatron-LM's examples (examples/gpt3/train_gpt3_175b_distributed.sh, and the 345M model of
#: examples/gpt3/README.md's configuration): shape, parallelism, micro-batch.
EXAMPLES = {
    "GPT-3 175B": {
        "layers": 96,
        "hidden": 12288,
        "heads": 96,
        "seq": 2048,
        "vocab": 50304,
        "micro_batch": 1,
        "tp": 8,
        "pp": 16,
        "dp": 8,
        "micro_batches": 1536 // 8,
    },
    "GPT 345M": {
        "layers": 24,
        "hidden": 1024,
        "heads": 16,
        "seq": 1024,
        "vocab": 50304,
        "micro_batch": 4,
        "tp": 2,
        "pp": 1,
        "dp": 8,
        "micro_batches": 2,
    },
}


def megatron(m: dict[str, int]) -> dict[str, float]:
    """Bytes by its formula: GPT with learned positions (which it leaves out), 4h wide MLPs, sequence parallelism and
    selective recomputation, the distributed optimizer."""
    h, v, t, p = m["hidden"], m["vocab"], m["tp"], m["pp"]
    layer = 2 * h * (4 * h + 2) + 4 * h * h
    block = layer * m["layers"] + 2 * h
    shard = (block / p + h * v) / t
    per_parameter = 6 + 12 / m["dp"]
    tokens = m["seq"] * m["micro_batch"]
    saved = tokens * h * (18 + 4 * 4) * m["layers"] + 8 * tokens * p + tokens * h * p
    if p > 1:
        saved *= min(1, m["micro_batches"] / p)
    else:
        saved += tokens * h * 4 * (1 + v / h)
    return {"parameters": shard, "model": shard * per_parameter, "activations": saved / t}


def ours(m: dict[str, int]) -> dict[str, float]:
    """The same of a GPT-2 of that shape: bf16 weights with fp32 gradients (which Megatron counts as 4 bytes), masters
    and moments over the data-parallel ranks; fused attention, whose scores selective recomputation does not keep."""
    config = {
        **(published("gpt2") or {}),
        "n_embd": m["hidden"],
        "n_layer": m["layers"],
        "n_head": m["heads"],
        "n_positions": m["seq"],
        "vocab_size": m["vocab"],
        "activation_function": "gelu",
    }
    e = estimate(
        config,
        "adamw+fp32/zero1",
        gradients="fp32",
        world_size=m["dp"],
        tp=m["tp"],
        pp=m["pp"],
        batch=m["micro_batch"],
        seq=m["seq"],
        accumulate=m["micro_batches"],
        regather=True,
    )
    column = e.columns[0]
    grads = sum(r.nbytes for r in column.rows if r.what == "gradients" and "buckets" not in r.detail)
    weights = column.nbytes("weights")
    assert e.activations is not None
    return {
        "parameters": weights / 2,
        "model": weights + grads + column.nbytes("state"),
        "activations": e.activations.saved,
    }


def titan() -> list[dict[str, Any]]:
    found = []
    with (HERE / "measured" / "torchtitan_parallel.csv").open(newline="") as file:
        for r in csv.DictReader(file):
            pp, ranks = int(r["pp"]), int(r["shard"]) * int(r["cp"])
            spec = "adamw/zero2" if pp > 1 else "adamw/zero3" if ranks > 1 else "adamw"
            e = estimate(
                r["model"],
                spec,
                gpu="h100-nvl",
                world_size=int(r["shard"]),
                tp=int(r["tp"]),
                pp=pp,
                cp=int(r["cp"]),
                batch=int(r["micro_batch"]),
                seq=int(r["seq"]),
                accumulate=int(r["local_batch"]) // int(r["micro_batch"]),
                checkpointing=r["checkpointing"],
                schedule=r["schedule"] or "1f1b",
                mixed="bf16",
                float8="float8" in r["techniques"],
            )
            reserved, measured = e.columns[0].reserved, float(r["gib"]) * GIB
            found.append(
                {
                    **r,
                    "expected": reserved.expected,
                    "high": reserved.high,
                    "error": round(reserved.expected / measured - 1, 4),
                }
            )
    return found


def table(rows: list[dict[str, Any]], examples: dict[str, Any]) -> str:
    errors = sorted(abs(r["error"]) for r in rows)
    alone = [abs(r["error"]) for r in rows if not r["techniques"]]
    above = [r for r in rows if r["high"] < float(r["gib"]) * GIB]
    lines = [
        "# Estimates under parallelism",
        "",
        "## torchtitan's tables",
        "",
        "Llama 3.1 on H100 (96 GB), December 2024 (benchmarks/llama3_h100_202412_torchtitan.md of",
        "pytorch/torchtitan). *Reserved*, GiB: what was published, and what is estimated for the run in eager mode.",
        "What torch.compile saves and fuses is not known here, nor what AsyncTP keeps: such rows are side by side, no",
        f"more. Off by {errors[len(errors) // 2]:.1%} in the median and {errors[-1]:.1%} at most; rows",
        f"without torch.compile by at most {max(alone):.1%}. {len(above)} of {len(rows)} need more than *at most*",
        f"({', '.join(r['id'] for r in above)}).",
        "",
        "| row | model | FSDP | TP | PP | CP | batch | seq | checkpointing | with | published | expected | at most |"
        " off |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        pipeline = f"{r['pp']} {r['schedule']}" if r["schedule"] else r["pp"]
        lines.append(
            f"| {r['id']} | {r['model']} | {r['shard']} | {r['tp']} | {pipeline} | {r['cp']} | {r['local_batch']} | "
            f"{int(r['seq']):,} | {r['checkpointing']} | {r['techniques']} | {float(r['gib']):.1f} | "
            f"{r['expected'] / GIB:.1f} | {r['high'] / GIB:.1f} | {r['error']:+.1%} |"
        )
    lines += [
        "",
        "## Megatron-LM's formula",
        "",
        "Of the fullest pipeline stage, GiB. Its formula has no learned positions, no statistics of norms and no",
        "output that waits to be sent.",
        "",
        "| example | | Megatron-LM | memopt | off |",
        "|---|---|---|---|---|",
    ]
    for name, (theirs, mine) in examples.items():
        for what in theirs:
            a, b = theirs[what], mine[what]
            shown = f"{a / 1e9:.3f} B | {b / 1e9:.3f} B" if what == "parameters" else f"{a / GIB:.2f} | {b / GIB:.2f}"
            lines.append(f"| {name} | {what} | {shown} | {b / a - 1:+.1%} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    rows = titan()
    examples = {name: (megatron(m), ours(m)) for name, m in EXAMPLES.items()}
    text = table(rows, examples)
    print(text)
    if args.write:
        results = HERE / "results"
        write_result(results / "estimates_parallel.json", {"torchtitan": rows, "megatron": examples})
        (results / "estimates_parallel.md").write_text(text)


if __name__ == "__main__":
    main()
