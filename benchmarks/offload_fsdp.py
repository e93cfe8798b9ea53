"""A step of ``adamw-8bit@cpu/zero3`` against torch's fused AdamW under FSDP2's ``CPUOffloadPolicy``, on two gloo ranks.

    python benchmarks/offload_fsdp.py        writes benchmarks/results/offload_fsdp.json and .md

Both models are cut by ``fully_shard`` with ``CPUOffloadPolicy``, so that parameters, gradients and state are in host
memory. Steps are interleaved, the first of each pair in turn; wall time of a step is that of the slower rank. There is
no card here: what both leave out, copies between card and host, is the same for both. Bars: 0.7 of the step's time, a
quarter of the state.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from provenance import write_result
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import memopt
from tests.helpers import ranks

RESULTS = Path(__file__).parent / "results" / "offload_fsdp.json"
SPEC, WORLD, WIDTH, LAYERS, WARM = "adamw-8bit@cpu/zero3", 2, 2048, 6, 3


def _model() -> nn.Module:
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    for layer in model:
        fully_shard(layer, offload_policy=CPUOffloadPolicy(pin_memory=False))
    fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    return model


def measure(rounds: int) -> dict[str, Any]:
    """Of this rank: bytes of state, and the times of both steps in each round."""
    models = {"memopt": _model(), "torch": _model()}
    optimizers: dict[str, torch.optim.Optimizer] = {
        "memopt": memopt.create(models["memopt"], SPEC, lr=1e-3),
        "torch": torch.optim.AdamW(models["torch"].parameters(), lr=1e-3, fused=True),
    }
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
    for model in models.values():  # gradients by a real backward pass: reduce-scattered, on the host
        model(x).square().mean().backward()
    times: dict[str, list[tuple[float, float]]] = {"memopt": [], "torch": []}
    for i in range(WARM + rounds):
        for name in sorted(times, reverse=i % 2 == 0):
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            optimizers[name].step()
            if i >= WARM:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    nbytes = {
        name: sum(_nbytes(x) for state in opt.state.values() for x in state.values())
        for name, opt in optimizers.items()
    }
    return {"times": times, "nbytes": nbytes, "explain": optimizers["memopt"].explain()}  # type: ignore[attr-defined]


def _nbytes(x: Any) -> int:
    local = x.to_local() if hasattr(x, "to_local") else x
    return int(local.nbytes) if isinstance(local, torch.Tensor) else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    found = ranks.run(measure, WORLD, args.rounds)
    slower = {
        name: [max(rank["times"][name][i][0] for rank in found) for i in range(args.rounds)]
        for name in ("memopt", "torch")
    }
    cpu = {name: median(t for rank in found for _, t in rank["times"][name]) for name in slower}
    nbytes = {name: sum(rank["nbytes"][name] for rank in found) for name in slower}
    ratios = sorted(a / b for a, b in zip(slower["memopt"], slower["torch"], strict=True))
    record = {
        "spec": SPEC,
        "parameters": LAYERS * WIDTH * (WIDTH + 1),
        "ranks": WORLD,
        "rounds": args.rounds,
        "seconds": {name: median(each) for name, each in slower.items()},
        "cpu_seconds": cpu,
        "ratio": median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
        "nbytes": nbytes,
        "of_state": nbytes["memopt"] / nbytes["torch"],
        "explain": found[0]["explain"],
    }
    write_result(RESULTS, record)
    RESULTS.with_suffix(".md").write_text(page(record))
    print(page(record))
    return 0


def page(r: dict[str, Any]) -> str:
    ms = {name: f"{1000 * t:.1f}" for name, t in r["seconds"].items()}
    cpu = {name: f"{1000 * t:.1f}" for name, t in r["cpu_seconds"].items()}
    low, high = r["ratio_quartiles"]
    return (
        "# Offload under FSDP2\n\n"
        f"`{r['spec']}` against torch's fused AdamW, both under `CPUOffloadPolicy`, {r['parameters']:,} parameters, "
        f"{r['ranks']} gloo ranks, {r['rounds']} interleaved steps. By `benchmarks/offload_fsdp.py`.\n\n"
        "| | step, ms (slower rank) | processor time, ms | state, bytes |\n|---|---|---|---|\n"
        f"| `{r['spec']}` | {ms['memopt']} | {cpu['memopt']} | {r['nbytes']['memopt']:,} |\n"
        f"| torch fused AdamW | {ms['torch']} | {cpu['torch']} | {r['nbytes']['torch']:,} |\n\n"
        f"Of each pair of steps {r['ratio']:.2f} of the time (quartiles {low:.2f} and {high:.2f}; bar 0.7), "
        f"{r['of_state']:.3f} of the state (bar 0.25 and what scales take).\n"
    )


if __name__ == "__main__":
    sys.exit(main())
