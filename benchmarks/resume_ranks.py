"""Saved on a ranks and resumed on b, by the framework's own calls: /zero1, /zero3 and DeepSpeed's stages 1 to 3.

    python benchmarks/resume_ranks.py        writes benchmarks/results/resume_ranks.json and .md
    python benchmarks/resume_ranks.py --only zero1

Every a and b of 1, 2, 3 processes over gloo. Gradients are chosen so that sums over ranks are exact: what goes on from
a checkpoint is held against one process that never stopped, parameter by parameter. accelerate saves with
``save_state`` and loads with ``load_state``; DeepSpeed saves with ``engine.save_checkpoint`` and loads with
``engine.load_checkpoint``, or on other ranks ``memopt.integrations.deepspeed_load.load_checkpoint``.
Rows that are there already are not run again (``--again`` runs all).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from provenance import write_result

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import memopt
from tests.helpers import flattened, loops, ranks, sharded
from tests.helpers.cases import HYPER

RESULTS = Path(__file__).parent / "results" / "resume_ranks.json"
STEPS, MORE, WORLDS = 3, 2, (1, 2, 3)
#: name -> how it is run, and the specs.
ROWS: dict[str, tuple[str, list[str]]] = {
    "accelerate, DDP, /zero1": ("ddp", ["adamw", "adamw-8bit", "adafactor"]),
    "accelerate, FSDP2, /zero3": ("fsdp2", ["adamw", "adamw-8bit", "adafactor"]),
    "DeepSpeed stage 1": ("1", ["adamw", "adamw-8bit", "adafactor"]),
    "DeepSpeed stage 2": ("2", ["adamw", "adamw-8bit", "adafactor"]),
    "DeepSpeed stage 3": ("3", ["adamw", "adamw-8bit", "adafactor"]),
}


def _engine(how: str, spec: str) -> tuple[Any, Any, Any]:
    """``(loss and step, save(path), load(path))`` with the parameters whole."""
    if how in "123":
        engine, optimizer = flattened.started(spec, int(how))

        def load(path: str, same: bool) -> None:
            from memopt.integrations.deepspeed_load import load_checkpoint

            if same:
                engine.load_checkpoint(path, tag="middle")
            else:
                load_checkpoint(engine, path, tag="middle")

        return engine, lambda path: engine.save_checkpoint(path, tag="middle"), load
    import accelerate

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.update(ACCELERATE_TORCH_DEVICE="cpu", LOCAL_RANK=os.environ["RANK"])
    text = f"{spec}/{'zero1' if how == 'ddp' else 'zero3'}"
    settings = {**loops._accelerator(how, text), "gradient_accumulation_steps": 1}
    if how == "fsdp2":  # its parameters are in no layers
        settings["fsdp_plugin"] = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
    accelerator = accelerate.Accelerator(**settings)
    model = flattened.model_of(torch.float32)
    optimizer = memopt.create(model, text, **HYPER.get(memopt.parse(spec).rule, {}))
    model, prepared = accelerator.prepare(model, optimizer)
    return (accelerator, model, prepared), accelerator.save_state, lambda path, same: accelerator.load_state(path)


def _drive(running: Any, first: int, steps: int) -> None:
    if not isinstance(running, tuple):
        flattened.drive(running, first, steps)
        return
    accelerator, model, prepared = running
    for step in range(first, first + steps):
        accelerator.backward(model(step))
        prepared.step()
        prepared.zero_grad()


def _whole(running: Any) -> dict[str, torch.Tensor]:
    """Parameters in fp32, as this rank sees them."""
    if isinstance(running, tuple):
        named = running[0].unwrap_model(running[1]).named_parameters()
        return {name.removeprefix("module."): sharded.whole(p) for name, p in named}
    from deepspeed.runtime.zero import GatheredParameters

    found = {}
    for name, p in running.module.named_parameters():
        with GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            found[name] = p.detach().clone()
    return found


def save(folder: str, rows: list[tuple[str, str]]) -> None:
    for how, spec in rows:
        running, keep, _ = _engine(how, spec)
        _drive(running, 0, STEPS)
        keep(f"{folder}/{how}-{spec}-{os.environ['WORLD_SIZE']}")


def resume(folder: str, rows: list[tuple[str, str, int]]) -> list[dict[str, torch.Tensor]]:
    found = []
    for how, spec, saved_by in rows:
        running, _, load = _engine(how, spec)
        load(f"{folder}/{how}-{spec}-{saved_by}", str(saved_by) == os.environ["WORLD_SIZE"])
        _drive(running, STEPS, MORE)
        found.append(_whole(running))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--again", action="store_true", help="run rows that are there already, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    done: dict[str, Any] = {}
    if RESULTS.exists() and not args.again:
        done = json.loads(RESULTS.read_text())["rows"]
    for name, (how, specs) in ROWS.items():
        if args.only not in name:
            continue
        todo = [spec for spec in specs if any(f"{name} {spec} {a}->{b}" not in done for a in WORLDS for b in WORLDS)]
        if not todo:
            continue
        with tempfile.TemporaryDirectory() as folder:
            for a in WORLDS:
                ranks.run(save, a, folder, [(how, spec) for spec in todo])
            # What FSDP2 cuts within a block stays in 32 bits there.
            same = {spec: sharded.CUT_WITHIN if how == "fsdp2" and spec != "adamw" else {} for spec in todo}
            expected = {spec: flattened.alone(spec, STEPS + MORE, overrides=same[spec])[0] for spec in todo}
            for b in WORLDS:
                rows = [(how, spec, a) for spec in todo for a in WORLDS]
                by_rank = ranks.run(resume, b, folder, rows)
                for i, (_, spec, a) in enumerate(rows):
                    worst = max(_difference(rank[i], expected[spec]) for rank in by_rank)
                    done[f"{name} {spec} {a}->{b}"] = worst
                    print(f"{name:28} {spec:12} {a} -> {b}: {worst:.2g}", flush=True)
        write_result(RESULTS, {"steps": STEPS, "more": MORE, "rows": done})
        RESULTS.with_suffix(".md").write_text(page(done))
    print(page(done))
    return 0


def _difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of the largest element of each parameter, the largest over all; 0 is to the bit."""
    pairs = [(found[name].float(), p.float()) for name, p in expected.items()]
    return max(float((x - p).abs().max() / p.abs().max()) for x, p in pairs)


def page(done: dict[str, float]) -> str:
    lines = [
        "# Saved on a ranks, resumed on b",
        "",
        f"Parameters after {STEPS} steps, a checkpoint and {MORE} more, against one process that never stopped: "
        "largest difference as a share of the largest element, 0 to the bit. By `benchmarks/resume_ranks.py`, gloo.",
        "",
        "| framework | spec | " + " | ".join(f"{a} → {b}" for a in WORLDS for b in WORLDS) + " |",
        "|---|---|" + "---|" * len(WORLDS) ** 2,
    ]
    for name, (_, specs) in ROWS.items():
        for spec in specs:
            cells = [done.get(f"{name} {spec} {a}->{b}") for a in WORLDS for b in WORLDS]
            shown = ["" if x is None else "0" if x == 0 else f"{x:.0e}" for x in cells]
            lines.append(f"| {name} | `{spec}` | " + " | ".join(shown) + " |")
    lines += [
        "",
        "Not 0: column means and norms are sums over ranks, in another order than one process's (`adafactor`); 8-bit",
        "blocks of DeepSpeed's vectors are not those of the parameters, from the first step on (`adamw-8bit`), and are",
        "encoded anew where vectors are cut elsewhere; DistributedDataParallel divides by three before it sums",
        "(`/zero1`).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
