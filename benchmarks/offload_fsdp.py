"""A step of ``adamw-8bit@cpu/zero3`` against torch's fused AdamW under FSDP2's ``CPUOffloadPolicy``, on two gloo ranks.

    python benchmarks/offload_fsdp.py        writes benchmarks/results/offload_fsdp.json and .md

Both models are cut by ``fully_shard`` with ``CPUOffloadPolicy``, so that parameters, gradients and state are in host
memory. Steps are interleaved, their order in turn; wall time of a step is that of the slower rank. There is no card
here: what all leave out, copies between card and host, is the same for all. Bars: 0.7 of the step's time, a quarter of
the state.

Beside the plain pair: without the look at NaN and Inf, which here is a read of all gradients and one collective; and
both clipped, as people train, by ``max_grad_norm`` and by ``torch.nn.utils.clip_grad_norm_``. ``roof`` is what bounds
the plain step from below on one thread of each rank (:mod:`roof`): a look at the gradients, and behind it the larger of
its loads and stores without arithmetic and its arithmetic on what stays in the cache of a core.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import roof
import torch
import torch.distributed as dist
from provenance import write_result
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import memopt
from tests.helpers import ranks

RESULTS = Path(__file__).parent / "results" / "offload_fsdp.json"
SPEC, WORLD, WIDTH, LAYERS, WARM = "adamw-8bit@cpu/zero3", 2, 2048, 6, 3
PLAIN, CLIPPED = ("memopt", "torch"), ("memopt, clipped", "torch, clipped")
#: What an optimizer of ours is made with; None for torch's.
STEPS: dict[str, dict[str, Any] | None] = {
    "memopt": {},
    "torch": None,
    "propagate": {"nonfinite": "propagate"},
    "memopt, clipped": {"max_grad_norm": 1e9},
    "torch, clipped": None,
}
LABELS = {
    "memopt": f"`{SPEC}`",
    "torch": "torch fused AdamW",
    "propagate": '`nonfinite="propagate"`',
    "memopt, clipped": "`max_grad_norm=`",
    "torch, clipped": "torch's `clip_grad_norm_` and fused AdamW",
}


def _model() -> nn.Module:
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    for layer in model:
        fully_shard(layer, offload_policy=CPUOffloadPolicy(pin_memory=False))
    fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    return model


def measure(rounds: int, library: str) -> dict[str, Any]:
    """Of this rank: bytes of state, the times of all steps in each round, and the roof in seconds."""
    models = {name: _model() for name in STEPS}
    optimizers: dict[str, Any] = {
        name: torch.optim.AdamW(models[name].parameters(), lr=1e-3, fused=True)
        if how is None
        else memopt.create(models[name], SPEC, lr=1e-3, **how)
        for name, how in STEPS.items()
    }
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
    for model in models.values():  # gradients by a real backward pass: reduce-scattered, on the host
        model(x).square().mean().backward()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in STEPS}
    names = list(STEPS)
    for i in range(WARM + rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            if name == CLIPPED[1]:
                torch.nn.utils.clip_grad_norm_(models[name].parameters(), 1e9)
            optimizers[name].step()
            if i >= WARM:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    nbytes = {
        name: sum(_nbytes(x) for state in optimizers[name].state.values() for x in state.values()) for name in PLAIN
    }
    numel = sum(p.to_local().numel() for p in models[PLAIN[0]].parameters())
    dist.barrier()
    return {
        "times": times,
        "nbytes": nbytes,
        "explain": optimizers[PLAIN[0]].explain(),
        "roof": _roof(numel // roof.CHUNK * roof.CHUNK, library),
    }


def _roof(numel: int, library: str) -> dict[str, float]:
    """Seconds of the look, of the step's loads and stores, and of its arithmetic, on this rank's thread."""
    p = nn.Parameter(torch.randn(numel // roof.CHUNK, roof.CHUNK))
    p.grad = torch.randn_like(p)
    opt = memopt.create([p], "adamw-8bit", lr=1e-3)
    opt.step()
    passes = roof.passes("adamw", p, opt.state[p])
    return {
        "look": roof.memory(passes[:1], numel, library),
        "memory": roof.memory(passes[1:], numel, library),
        "arithmetic": roof.arithmetic("adamw-8bit", numel, nonfinite="propagate"),
    }


def _nbytes(x: Any) -> int:
    local = x.to_local() if hasattr(x, "to_local") else x
    return int(local.nbytes) if isinstance(local, torch.Tensor) else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = ranks.run(measure, WORLD, args.rounds, roof.build(folder))
    slower = {name: [max(rank["times"][name][i][0] for rank in found) for i in range(args.rounds)] for name in STEPS}
    nbytes = {name: sum(rank["nbytes"][name] for rank in found) for name in PLAIN}
    bounds = {part: max(rank["roof"][part] for rank in found) for part in found[0]["roof"]}
    record = {
        "spec": SPEC,
        "parameters": LAYERS * WIDTH * (WIDTH + 1),
        "ranks": WORLD,
        "rounds": args.rounds,
        "seconds": {name: median(each) for name, each in slower.items()},
        "cpu_seconds": {name: median(t for rank in found for _, t in rank["times"][name]) for name in STEPS},
        "ratio": _ratios(slower, *PLAIN),
        "ratio_propagate": _ratios(slower, "propagate", PLAIN[1]),
        "ratio_clipped": _ratios(slower, *CLIPPED),
        "roof_seconds": bounds,
        "roof": (bounds["look"] + max(bounds["memory"], bounds["arithmetic"])) / median(slower[PLAIN[1]]),
        "nbytes": nbytes,
        "of_state": nbytes[PLAIN[0]] / nbytes[PLAIN[1]],
        "explain": found[0]["explain"],
    }
    write_result(RESULTS, record)
    RESULTS.with_suffix(".md").write_text(page(record))
    print(page(record))
    return 0


def _ratios(times: dict[str, list[float]], one: str, other: str) -> list[float]:
    """The quartiles and, in the middle, the median of the ratio in each round."""
    found = sorted(a / b for a, b in zip(times[one], times[other], strict=True))
    return [found[len(found) // 4], median(found), found[3 * len(found) // 4]]


def page(r: dict[str, Any]) -> str:
    lines = [
        "# Offload under FSDP2",
        "",
        f"`{r['spec']}` against torch's fused AdamW, both under `CPUOffloadPolicy`, {r['parameters']:,} parameters, "
        f"{r['ranks']} gloo ranks of one thread, {r['rounds']} interleaved steps. By `benchmarks/offload_fsdp.py`.",
        "",
        "| | step, ms (slower rank) | processor time, ms | state, bytes |",
        "|---|---|---|---|",
    ]
    for name, seconds in r["seconds"].items():
        nbytes = format(r["nbytes"][name], ",") if name in r["nbytes"] else ""
        lines.append(f"| {LABELS[name]} | {1000 * seconds:.1f} | {1000 * r['cpu_seconds'][name]:.1f} | {nbytes} |")
    (low, middle, high), (_, plain, _), (_, clipped, _) = (
        r[key] for key in ("ratio", "ratio_propagate", "ratio_clipped")
    )
    parts = ", ".join(f"{part} {1000 * seconds:.1f} ms" for part, seconds in r["roof_seconds"].items())
    lines += [
        "",
        f"Of each pair of steps {middle:.2f} of the time (quartiles {low:.2f} and {high:.2f}; bar 0.7), {plain:.2f} "
        f"without the look at NaN and Inf, {clipped:.2f} where both clip; {r['of_state']:.3f} of the state (bar 0.25 "
        "and what scales take). What bounds the plain step from below on one thread of each rank is "
        f"{r['roof']:.2f} of torch's step ({parts}: the look, and behind it the larger of the other two).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
