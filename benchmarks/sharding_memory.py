"""Resident memory of a rank while it loads a checkpoint that another number of processes saved.

    python benchmarks/sharding_memory.py            writes benchmarks/results/sharding_memory.json and .md

The bar: the process grows by at most its own state and one tensor (a moment of one parameter, whole).
"""

from __future__ import annotations

import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import memopt
from memopt.train.resident import peak_resident

sys.path.insert(0, str(Path(__file__).parent.parent))
from provenance import write_result

from tests.helpers import ranks

MIB = 2**20
WIDTH, LAYERS = 2048, 8
#: (spec, how, saved by, loaded by)
CASES = [
    (spec, how, a, b)
    for spec, how in [
        ("adamw/zero1", "memopt"),
        ("adamw-8bit/zero1", "memopt"),
        ("adamw/zero3", "memopt"),
        ("adamw-8bit/zero3", "memopt"),
        ("adamw/zero3", "DCP"),
        ("adamw-8bit/zero3", "DCP"),
    ]
    for a, b in [(2, 2), (1, 2), (2, 1)]
]


def built(spec: str) -> tuple[nn.Module, memopt.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    if not spec.endswith("/zero1"):
        memopt.shard(model, spec)
    return model, memopt.create(model, spec)


def save(spec: str, how: str, path: str) -> None:
    model, opt = built(spec)
    opt.init_state()
    with torch.no_grad():
        for state in opt.state.values():
            for key, x in state.items():
                x.fill_(3 if "codes" in key else 1)
    if how == "memopt":
        memopt.save(path, model=model, optimizer=opt)
    else:
        parameters, state = get_state_dict(model, opt)
        dcp.save({"model": parameters, "optimizer": state}, checkpoint_id=path)


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def load(spec: str, how: str, path: str) -> dict[str, int]:
    """Bytes by which this process has grown at the most, and of its state."""
    model, opt = built(spec)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    before = resident()
    if how == "memopt":
        memopt.load(path, model=model, optimizer=opt, rng=False)
    else:
        opt.init_state()  # else the helpers make it by a step, with gradients
        parameters, state = get_state_dict(model, opt)
        found = {"model": parameters, "optimizer": state}
        dcp.load(found, checkpoint_id=path)
        set_state_dict(model, opt, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    grown = peak_resident() - before
    assert all(
        float(x.float().min()) == (3 if "codes" in key else 1)
        for state in opt.state.values()
        for key, x in state.items()
    )
    return {"grown": grown, "state": opt.ledger().nbytes}


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for spec, how, a, b in CASES:
            path = f"{folder}/{spec.replace('/', '_')} {how} {a}"
            if not Path(path).exists():
                ranks.run(save, a, spec, how, path)
            worst = max(ranks.run(load, b, spec, how, path), key=lambda rank: rank["grown"] - rank["state"])
            rows.append({"spec": spec, "how": how, "saved_by": a, "loaded_by": b, **worst, "tensor": 4 * WIDTH * WIDTH})
            print(rows[-1], flush=True)
    record = {"width": WIDTH, "layers": LAYERS, "torch": torch.__version__, "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    write_result(args.out / "sharding_memory.json", record)
    (args.out / "sharding_memory.md").write_text(page(record))
    print(page(record))
    return 1 if any(row["grown"] > row["state"] + row["tensor"] for row in rows) else 0


def page(record: dict[str, Any]) -> str:
    lines = [
        "# Resident memory while sharded state is loaded",
        "",
        f"{record['layers']} matrices of {record['width']}² in fp32: one moment of one of them has "
        f"{record['rows'][0]['tensor'] // MIB} MiB. The worst rank; the bar is its state and one such tensor. Written "
        "by `benchmarks/sharding_memory.py`.",
        "",
        "| spec | with | saved by | loaded by | state, MiB | the process grew by, MiB | more than its state, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in record["rows"]:
        lines.append(
            f"| `{r['spec']}` | {r['how']} | {r['saved_by']} | {r['loaded_by']} | {r['state'] / MIB:.1f} | "
            f"{r['grown'] / MIB:.1f} | {(r['grown'] - r['state']) / MIB:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
