"""Every rule and format that needs shapes under DeepSpeed, on 1 to 3 gloo processes, against one process.

    python benchmarks/deepspeed_matrix.py            writes benchmarks/results/deepspeed_matrix.json and .md

The model has rows that nothing divides, fewer rows than processes, vectors and a stack of matrices; weights are fp32,
or bf16 under DeepSpeed's bf16 optimizer (stage 1) and ZeRO (stages 2 and 3). Gradients are chosen so that their means
over ranks are exact. What is whole on a rank goes through kernels as in one process, what several share through
kernels that sum as ranks do (in one process: with ``/zero1``), and through torch where a row is cut. So each parameter
has three references of one process, and is to be one of them to the bit; the table says how far it is from the first.
Bytes are to be those of memopt.price.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

import memopt
from memopt.kernels import loader
from memopt.layout.flattened import needs_shapes

sys.path.insert(0, str(Path(__file__).parent.parent))
from provenance import write_result

from tests.helpers import flattened, ranks
from tests.helpers.cases import HYPER

FORMATS = ("32bit", "8bit", "4bit", "factored")
#: Stage, offload to the CPU, dtype of the weights.
WAYS = [
    (1, False, "float32"),
    (1, False, "bfloat16"),
    (2, False, "float32"),
    (2, True, "float32"),
    (3, False, "float32"),
    (3, True, "bfloat16"),
]
WORLDS = (1, 2, 3)


def specs() -> list[str]:
    return [
        str(spec)
        for spec in memopt.specs()
        if spec.format in FORMATS
        and (spec.placement, spec.partition, spec.master) == ("device", "none", "none")
        and spec.resolve(HYPER.get(spec.rule, {}))
        and needs_shapes(spec.replace(hyper=HYPER.get(spec.rule, {})))
    ]


def name_of(stage: int, offload: bool, dtype: str) -> str:
    return f"stage {stage}{', offload' * offload}{', bf16' * (dtype != 'float32')}"


def everything(chosen: list[str], steps: int) -> dict[Any, Any]:
    """On this rank: what it has of every parameter, and whether its bytes are as predicted."""
    found: dict[Any, Any] = {}
    for spec in chosen:
        for way in WAYS:
            stage, offload, dtype = way
            engine, optimizer = flattened.started(spec, stage, offload, getattr(torch, dtype))
            flattened.drive(engine, 0, steps)
            shapes = {name: flattened.shape_of(p) for name, p in engine.module.named_parameters()}
            priced = memopt.price(
                shapes,
                spec,
                world_size=dist.get_world_size(),
                rank=dist.get_rank(),
                deepspeed=stage,
                **HYPER.get(memopt.parse(spec).rule, {}),
            )
            parts = {name: one[:3] for name, one in flattened.found(optimizer).items()}
            found[spec, way] = parts, priced == optimizer.ledger()
            engine.destroy()
    return found


def references(spec: str, steps: int, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    found = [flattened.alone(text, steps, dtype)[0] for text in (spec, f"{spec}/zero1")]
    with patch.object(loader, "_loaded", loader.Missing("turned off")):
        return [*found, flattened.alone(spec, steps, dtype)[0]]


def compared(session: Any, key: Any, expected: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Parameters that are no reference's, and the largest error against the first over the largest element."""
    other, error = [], 0.0
    for name, p in expected[0].items():
        got = flattened.whole(session, lambda rank: rank[key][0], name, p)
        if not any(torch.equal(got, one[name]) for one in expected):
            other.append(name)
        error = max(error, float((got - p).abs().max() / p.abs().max()))
    return {"other": other, "kernels": error, "priced": all(rank[key][1] for rank in session)}


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", default="", help="specs that contain this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [spec for spec in specs() if args.only in spec]
    sessions = {world: ranks.run(everything, world, chosen, args.steps) for world in WORLDS}
    rows = []
    for spec in chosen:
        for dtype in ("float32", "bfloat16"):
            expected = references(spec, args.steps, getattr(torch, dtype))
            for way in (way for way in WAYS if way[2] == dtype):
                for world, session in sessions.items():
                    rows.append(
                        {"spec": spec, "way": name_of(*way), "world": world, **compared(session, (spec, way), expected)}
                    )
    record = {"steps": args.steps, "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    write_result(args.out / "deepspeed_matrix.json", record)
    (args.out / "deepspeed_matrix.md").write_text(page(record))
    print(page(record))
    return 0 if all(row["priced"] and not row["other"] for row in rows) else 1


def page(record: dict[str, Any]) -> str:
    rows = record["rows"]
    wrong = [r for r in rows if r["other"] or not r["priced"]]
    lines = [
        "# Shapes behind DeepSpeed's vectors",
        "",
        f"{len(rows)} cells of {record['steps']} steps: parameters of one process to the bit and bytes of the price in "
        f"{len(rows) - len(wrong)} of them. Columns are processes, numbers the largest difference from one process "
        "with kernels, over the largest element. Written by `benchmarks/deepspeed_matrix.py`.",
        "",
        "| spec | " + " | ".join(f"{way}, {world}" for way in ways(rows) for world in WORLDS[1:]) + " |",
        "|---" * (1 + 2 * len(ways(rows))) + "|",
    ]
    for spec in dict.fromkeys(r["spec"] for r in rows):
        cells = {(r["way"], r["world"]): f"{r['kernels']:.0e}" for r in rows if r["spec"] == spec}
        lines.append(f"| `{spec}` | " + " | ".join(cells[w, n] for w in ways(rows) for n in WORLDS[1:]) + " |")
    lines += ["", *(f"Not as it should be: {r}" for r in wrong)]
    return "\n".join(lines).rstrip() + "\n"


def ways(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name_of(*way) for way in WAYS))


if __name__ == "__main__":
    sys.exit(main())
