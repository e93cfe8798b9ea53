"""Every rule × format × sharded partition on 1 to 4 gloo processes, against one process; and checkpoints saved by a and
loaded by b processes, for all a and b.

    python benchmarks/sharding_matrix.py            writes benchmarks/results/sharding_matrix.json and .md

The model has rows that nothing divides (255, 257), fewer rows than processes, vectors and a stack of matrices. Steps
are on random gradients that do not depend on the parameters. Sums over ranks are taken in fp64, as by one process whose
spec has a partition; without one they are quicker, so there are two references. The bars: every bit of parameters and
state that of one process with a partition; parameters within 1e-6 of the largest element of what one process without a
partition gives; bytes of every rank those of memopt.price. References are computed once; each number of processes is
started twice, for the matrix and for what the others have saved.
"""

from __future__ import annotations

import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import memopt
from memopt.core.rows import Rows
from memopt.kernels import loader
from memopt.layout.param import resolve_layout
from memopt.rules import RULES

sys.path.insert(0, str(Path(__file__).parent.parent))
from provenance import write_result

from tests.helpers import ranks, sharded
from tests.helpers.cases import HYPER

WORLDS = (1, 2, 3, 4)
FORMATS = ("32bit", "8bit", "4bit", "factored")
PARTITIONS = ("zero1", "zero2", "zero3")
RTOL = 1e-6
#: Steps before a checkpoint, and after it has been loaded.
BEFORE, AFTER = 3, 3
#: What is saved and loaded under every partition; with torch.distributed.checkpoint and memopt.save.
MOVED = ("adamw", "adamw-8bit", "adamw-4bit", "adamw-factored", "adafactor", "lion-8bit", "came-8bit", "adammini-4bit")


def specs() -> list[str]:
    return [
        str(spec)
        for spec in memopt.specs()
        if spec.format in FORMATS
        and spec.partition in PARTITIONS
        and spec.placement == "device"
        and spec.master == "none"
    ]


# One process ---------------------------------------------------------------------------------------------------------


def alone(spec: str) -> str:
    """The file of a reference: ``/zero2`` and ``/zero3`` have the same one."""
    parsed = memopt.parse(spec)
    return f"{parsed.replace(partition='none')}{'' if parsed.partition == 'zero1' else ' cut'}"


Found = dict[str, tuple[Tensor, dict[str, Tensor]]]


def write_references(chosen: list[str], steps: int, folder: str) -> None:
    torch.set_num_threads(1)
    for spec in {alone(spec): spec for spec in chosen}.values():
        usual = driven(spec, "none", steps)
        torch.save(usual, f"{folder}/{alone(spec)} usual {steps}")
        torch.save(as_ranks(spec, usual, steps), f"{folder}/{alone(spec)} summed {steps}")


def as_ranks(spec: str, usual: Found, steps: int) -> Found:
    """What one process gives that takes sums as several do."""
    parsed = memopt.parse(spec)
    if parsed.rule == "adammini" and parsed.partition != "zero1":  # means of vectors that are cut are torch's
        with patch.object(loader, "_loaded", loader.Missing("turned off")):
            torchs = driven(spec, "none", steps)
        return {name: torchs[name] if p.dim() < 2 else (p, state) for name, (p, state) in usual.items()}
    summed = not RULES[parsed.rule].element_wise or parsed.format == "factored"
    return driven(spec, "zero1", steps) if summed else usual


def driven(spec: str, partition: str, steps: int) -> Found:
    model, opt = sharded.reference(spec, partition)
    sharded.drive(model, opt, 0, steps)
    return {name: (p.detach(), dict(opt.state[p])) for name, p in model.named_parameters()}


def reference(spec: str, steps: int, folder: str, sums: str) -> Found:
    found: Found = torch.load(f"{folder}/{alone(spec)} {sums} {steps}", mmap=True)
    return found


# Several -------------------------------------------------------------------------------------------------------------


def one(spec: str, steps: int, folder: str) -> dict[str, Any]:
    """On this rank: how it differs from one process that sums as ranks do, the error against one that does not, and
    whether bytes are as predicted."""
    model, opt = sharded.build(spec)
    sharded.drive(model, opt, 0, steps)
    hyper = HYPER.get(opt.spec.rule, {})
    priced = memopt.price(sharded.uneven_model(), spec, world_size=dist.get_world_size(), rank=dist.get_rank(), **hyper)
    usual = compare(model, opt, reference(spec, steps, folder, "usual"))["error"]
    same = compare(model, opt, reference(spec, steps, folder, "summed"))
    return {**same, "usual": usual, "priced": priced == opt.ledger()}


def compare(model: nn.Module, opt: memopt.Optimizer, expected: dict[str, Any]) -> dict[str, Any]:
    """The largest error of a parameter over its largest element, and how many numbers of the state are others."""
    error, other = 0.0, 0
    for name, p, group in opt.params.entries():
        whole, state = expected[name]
        error = max(error, float((sharded.whole(p) - whole).abs().max() / whole.abs().max()))
        for key, start in starts(opt, name, p, group).items():
            mine = opt.state[p][key]
            theirs = state[key] if mine.shape == state[key].shape else state[key][start : start + mine.shape[0]]
            other += int((mine != theirs).sum())
    return {"error": error, "other": other}


def starts(opt: memopt.Optimizer, name: str, p: Tensor, group: dict[str, Any]) -> dict[str, int]:
    """Where this rank's part of each tensor of the state begins along dimension 0 of the whole."""
    rows = opt.partition.local_rows(p)
    before = Rows(rows.shape, 0, rows.first, rows.flat)
    return {
        key: m.format.layout(m.moment, before)[part].shape[0]
        for m in resolve_layout(opt.spec, group, name, 0, rows, "float32").moments
        for part, key in m.keys
    }


def matrix(chosen: list[str], moved: list[str], steps: int, folder: str) -> dict[str, Any]:
    found = {spec: one(spec, steps, folder) for spec in chosen}
    for spec in moved:
        for save, _ in ways(spec).values():
            model, opt = sharded.build(spec)
            sharded.drive(model, opt, 0, BEFORE)
            save(model, opt, saved(folder, spec, dist.get_world_size()))
    return found


def saved(folder: str, spec: str, world: int) -> str:
    return f"{folder}/{spec.replace('/', '_')} by {world}"


def ways(spec: str) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """``(save, load)`` by name. torch.distributed.checkpoint knows nothing of rows of replicated parameters."""
    found = {"memopt": (_save, _load)}
    return found if spec.endswith("/zero1") else {**found, "DCP": (_save_dcp, _load_dcp)}


def _save(model: nn.Module, opt: memopt.Optimizer, path: str) -> None:
    memopt.save(path, model=model, optimizer=opt)


def _load(model: nn.Module, opt: memopt.Optimizer, path: str) -> None:
    memopt.load(path, model=model, optimizer=opt, rng=False)


def _save_dcp(model: nn.Module, opt: memopt.Optimizer, path: str) -> None:
    parameters, state = get_state_dict(model, opt)
    dcp.save({"model": parameters, "optimizer": state}, checkpoint_id=f"{path} dcp")


def _load_dcp(model: nn.Module, opt: memopt.Optimizer, path: str) -> None:
    parameters, state = get_state_dict(model, opt)
    found = {"model": parameters, "optimizer": state}
    dcp.load(found, checkpoint_id=f"{path} dcp")
    set_state_dict(model, opt, model_state_dict=found["model"], optim_state_dict=found["optimizer"])


def reshard(moved: list[str], folder: str) -> dict[tuple[str, str, int], dict[str, Any]]:
    """How training goes on from what every number of ranks saved, against one process that never stopped."""
    found = {}
    for spec in moved:
        expected = reference(spec, BEFORE + AFTER, folder, "summed")
        for way, (_, load) in ways(spec).items():
            for world in WORLDS:
                model, opt = sharded.build(spec)
                with torch.no_grad():
                    for p in model.parameters():
                        p.zero_()
                load(model, opt, saved(folder, spec, world))
                sharded.drive(model, opt, BEFORE, AFTER)
                found[spec, way, world] = compare(model, opt, expected)
    return found


# All -----------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default="", help="specs that contain this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    started = time.monotonic()
    chosen = [spec for spec in specs() if args.only in spec]
    moved = [spec for rule in MOVED for p in PARTITIONS if args.only in (spec := f"{rule}/{p}")]
    with tempfile.TemporaryDirectory() as folder:
        write_references(chosen, args.steps, folder)
        write_references(moved, BEFORE + AFTER, folder)
        by_world = {world: ranks.run(matrix, world, chosen, moved, args.steps, folder) for world in WORLDS}
        loaded = {world: ranks.run(reshard, world, moved, folder) for world in WORLDS}
    rows = [cell(spec, {world: [rank[spec] for rank in by_world[world]] for world in WORLDS}) for spec in chosen]
    grid = [
        {
            "spec": spec,
            "way": way,
            "saved_by": a,
            "loaded_by": b,
            **cell(spec, {b: [rank[spec, way, a] for rank in loaded[b]]}),
        }
        for b in WORLDS
        for spec, way, a in loaded[b][0]
    ]
    record = {
        "steps": args.steps,
        "before": BEFORE,
        "after": AFTER,
        "seconds": round(time.monotonic() - started),
        "torch": torch.__version__,
        "only": args.only,
        "rows": rows,
        "resharded": grid,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_result(args.out / "sharding_matrix.json", record)
    (args.out / "sharding_matrix.md").write_text(page(record))
    print(page(record))
    return 1 if any(row["outside"] for row in rows + grid) else 0


def cell(spec: str, by_world: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """The worst of all ranks by number of processes, and what is outside the bars."""
    bars = {"error": 0.0, "other": 0, "usual": RTOL}
    worst = {key: {world: max(rank.get(key, 0) for rank in ranks) for world, ranks in by_world.items()} for key in bars}
    wrong = [f"{key} on {w}: {x:g}" for key, bar in bars.items() for w, x in worst[key].items() if x > bar]
    wrong += [f"bytes on {w}" for w, ranks in by_world.items() if not all(rank.get("priced", True) for rank in ranks)]
    return {"spec": spec, **worst, "outside": wrong}


def page(record: dict[str, Any]) -> str:
    part = f"A part of the matrix (`--only {record['only']}`).\n\n" * bool(record["only"])
    rows, grid = record["rows"], record["resharded"]
    same = sum(not any(any(row[key].values()) for key in ("error", "other")) for row in rows)
    lines = [
        "# Sharded state against one process",
        "",
        f"{part}{record['steps']} steps on 1, 2, 3 and 4 gloo processes; {len(rows)} specs. Of {same} every bit of "
        "parameters, codes and scales is, on any number of processes, that of one process whose spec has a partition. "
        "The table: the largest error of a parameter over its largest element against one process without a partition, "
        "whose sums over a tensor are quicker and rounded otherwise; `0` is the same bits. Written "
        "by `benchmarks/sharding_matrix.py`.",
        "",
        "| spec | 1 | 2 | 3 | 4 |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row['usual'][w]:.0e}" if row["usual"][w] else "0" for w in WORLDS]
        lines.append(f"| `{row['spec']}` | " + " | ".join(cells) + " |")
    moved = sorted({f"`{row['spec']}`" for row in grid})
    same = sum(not any(any(row[key].values()) for key in ("error", "other")) for row in grid)
    lines += [
        "",
        f"Checkpoints saved by a and loaded by b processes, a and b from 1 to 4, with memopt.save and, of sharded "
        f"parameters, torch.distributed.checkpoint; {record['before']} steps before, {record['after']} after, against "
        f"one process that never stopped: {same} of {len(grid)} went on bit for bit. Specs: {', '.join(moved)}.",
        "",
    ]
    wrong = [f"* `{row['spec']}`: {', '.join(row['outside'])}" for row in record["rows"] if row["outside"]]
    wrong += [
        f"* `{row['spec']}` ({row['way']}) saved by {row['saved_by']}: {', '.join(row['outside'])}"
        for row in grid
        if row["outside"]
    ]
    lines += ["Outside the bars:", "", *wrong] if wrong else ["All within the bars."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
