"""Every rule × format × sharded partition on 1 to 4 gloo processes, against one process; and checkpoints saved by a and
loaded by b processes, for all a and b.

    python benchmarks/sharding_matrix.py            writes benchmarks/results/sharding_matrix.json and .md

The model has rows that nothing divides (255, 257), fewer rows than processes, vectors and a stack of matrices. Steps
are on random gradients that do not depend on the parameters. The bars: parameters within 1e-6 of the largest element,
codes and scales identical for element-wise rules, bytes of every rank those of memopt.price.
"""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import memopt
from memopt.rules import RULES

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import ranks
import sharded
from cases import HYPER

WORLDS = (1, 2, 3, 4)
FORMATS = ("32bit", "8bit", "4bit", "factored")
PARTITIONS = ("zero1", "zero2", "zero3")
RTOL = 1e-6
#: A code at the edge of its rounding may fall to the other side where the update differs in the last bit (whole-tensor
#: rules): one element's step changes by a share of the rate.
RTOL_CODES = 1e-2
RESHARDED = ("adamw/zero3", "adamw-8bit/zero3", "adamw-4bit/zero3", "lion-8bit/zero2", "adafactor/zero3")


def specs() -> list[str]:
    """By partition, so that references are shared."""
    return [
        str(spec)
        for spec in memopt.specs()
        if spec.format in FORMATS and spec.partition in PARTITIONS and spec.placement == "device"
        and spec.master == "none"
    ]  # fmt: skip


def one(spec: str, steps: int) -> dict[str, Any]:
    """The largest relative error of a parameter and the number of parts of state with other bits, on this rank."""
    hyper = HYPER.get(memopt.parse(spec).rule, {})
    reference, alone = sharded.reference(spec)
    sharded.drive(reference, alone, 0, steps)
    model, opt = sharded.build(spec)
    sharded.drive(model, opt, 0, steps)
    error, other = 0.0, 0
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        error = max(error, float((sharded.whole(p) - q.detach()).abs().max() / q.detach().abs().max()))
        rows = opt.partition.held(p)
        start, stop = rows.bounds
        for key, mine in opt.state[p].items():
            theirs = alone.state[q][key]
            cut = theirs if mine.shape == theirs.shape else theirs[_span(mine, theirs, start, stop, rows)]
            other += not torch.equal(mine, cut)
    priced = memopt.price(sharded.uneven_model(), spec, world_size=dist.get_world_size(), rank=dist.get_rank(), **hyper)
    return {"error": error, "other_bits": other, "priced": priced == opt.ledger()}


def _span(mine: torch.Tensor, theirs: torch.Tensor, start: int, stop: int, rows: Any) -> slice:
    """Where this rank's part stands along dimension 0 of the whole part."""
    if len(rows.shape) >= 2:
        return slice(rows.first, rows.stop)
    ratio = rows.shape[0] / theirs.shape[0]  # elements per entry: 1, 2 for packed codes, the block for scales
    first = round(start / ratio) if ratio < 3 else start // (128 if ratio < 200 else 256)
    return slice(first, first + mine.shape[0])


def matrix(chosen: list[str], steps: int, folder: str) -> dict[str, Any]:
    found = {spec: one(spec, steps) for spec in chosen}
    for spec in RESHARDED:
        model, opt = sharded.build(spec)
        sharded.drive(model, opt, 0, 3)
        parameters, state = get_state_dict(model, opt)
        name = f"{folder}/{spec.replace('/', '_')}-{dist.get_world_size()}"
        dcp.save({"model": parameters, "optimizer": state}, checkpoint_id=name)
    return found


def reshard(folder: str) -> dict[str, bool]:
    """Whether training goes on bit for bit (to RTOL for whole-tensor rules) from what every number of ranks saved."""
    found = {}
    for spec in RESHARDED:
        reference, alone = sharded.reference(spec)
        sharded.drive(reference, alone, 0, 6)
        for saved_by in WORLDS:
            model, opt = sharded.build(spec)
            parameters, state = get_state_dict(model, opt)
            saved = {"model": parameters, "optimizer": state}
            dcp.load(saved, checkpoint_id=f"{folder}/{spec.replace('/', '_')}-{saved_by}")
            set_state_dict(model, opt, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
            sharded.drive(model, opt, 3, 3)
            pairs = list(zip(map(sharded.whole, model.parameters()), reference.parameters(), strict=True))
            if RULES[memopt.parse(spec).rule].element_wise:
                same = all(torch.equal(a, b) for a, b in pairs)
            else:
                same = all((a - b).abs().max() <= RTOL * b.abs().max() for a, b in pairs)
            found[f"{spec} saved by {saved_by}"] = bool(same)
    return found


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default="", help="specs that contain this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    chosen = [spec for spec in specs() if args.only in spec]
    with tempfile.TemporaryDirectory() as folder:
        by_world = {world: ranks.run(matrix, world, chosen, args.steps, folder) for world in WORLDS}
        moved = {world: ranks.run(reshard, world, folder) for world in WORLDS}
    rows, wrong = [], []
    for spec in chosen:
        parsed = memopt.parse(spec)
        exact = RULES[parsed.rule].element_wise and parsed.format != "factored"
        bar = 0.0 if exact else RTOL if parsed.format in ("32bit", "factored") else RTOL_CODES
        row: dict[str, Any] = {"spec": spec, "exact": exact}
        for world in WORLDS:
            results = [rank[spec] for rank in by_world[world]]
            row[f"error_{world}"] = max(r["error"] for r in results)
            row[f"other_bits_{world}"] = sum(r["other_bits"] for r in results)
            if (
                row[f"error_{world}"] > bar
                or (exact and row[f"other_bits_{world}"])
                or not all(r["priced"] for r in results)
            ):
                wrong.append(f"{spec} on {world}: {results}")
        rows.append(row)
    grid = {
        f"{key}, loaded by {world}": all(rank[key] for rank in moved[world])
        for world in WORLDS
        for key in moved[world][0]
    }
    wrong += [key for key, same in grid.items() if not same]
    record = {"steps": args.steps, "torch": torch.__version__, "rows": rows, "resharded": grid, "wrong": wrong}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "sharding_matrix.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.out / "sharding_matrix.md").write_text(page(record))
    print(page(record))
    return 1 if wrong else 0


def page(record: dict[str, Any]) -> str:
    lines = [
        "# Sharded state against one process", "",
        f"{record['steps']} steps; the largest error of a parameter over its largest element, on 1, 2, 3 and 4 gloo "
        "processes. `0` is the same bits, of parameters, codes and scales. Written by `benchmarks/sharding_matrix.py`.",
        "", "| spec | 1 | 2 | 3 | 4 |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in record["rows"]:
        cells = ["0" if not row[f"error_{w}"] else f"{row[f'error_{w}']:.0e}" for w in WORLDS]
        lines.append(f"| `{row['spec']}` | " + " | ".join(cells) + " |")
    same = sum(record["resharded"].values())
    lines += ["", f"Checkpoints saved by a and loaded by b processes, a and b from 1 to 4, specs "
              f"{', '.join(f'`{s}`' for s in RESHARDED)}: {same} of {len(record['resharded'])} went on bit for bit "
              "(`adafactor`: to 1e-6).", ""]  # fmt: skip
    lines += [f"Outside the bars: {text}" for text in record["wrong"]] or ["All within the bars."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
