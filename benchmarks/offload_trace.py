"""The schedule of an offloaded step under fully_shard, two gloo ranks with a simulated device each, as a trace.

    python benchmarks/offload_trace.py       writes benchmarks/results/offload_trace.json and .md

The JSON opens in Perfetto or chrome://tracing: a process for each rank and way of bringing gradients to the host, a
thread for each stream. Operations of every stream take one made-up millisecond each, so that what waits for what can be
read; collectives are real and take none. Both steps of each are there: the first has no state yet.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from provenance import write_result
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import memopt
from memopt.placements.transfer import device
from tests.helpers import ranks, simulated
from tests.helpers.offloading import EVEN, Deep

RESULTS = Path(__file__).parent / "results" / "offload_trace.json"
SPEC, WORLD, STEPS = "adamw-8bit@cpu/zero3", 2, 2
#: What is said of each in the trace.
WAYS: dict[str, dict[str, Any]] = {
    "gradients come down in the step": {},
    "gradients leave in backward()": {"offload_gradients": True},
}


def scheduled(options: dict[str, Any]) -> tuple[list[tuple[str, float, float]], str]:
    """``(stream, begin, end)`` of this rank's operations in milliseconds, and the last step's time line."""
    made = simulated.DeviceTransfer(torch.device("cpu"), clock=simulated.Streams(EVEN))
    clock = made.clock
    assert clock is not None
    device.TRANSFERS["cpu"] = lambda where: made
    torch.manual_seed(0)
    model = memopt.shard(Deep(width=400), SPEC)
    for p in model.parameters():  # a millisecond of the backward pass for each shard that is reduced
        p.register_post_accumulate_grad_hook(lambda p: clock.submit("backward", lambda: None, [], 0) and None)
    optimizer = memopt.create(model, SPEC, lr=1e-3, workspace="8MiB", **options)
    last = 0
    for step in range(STEPS):
        last = len(clock.trace)
        _loss(model, 10 * step + dist.get_rank()).backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.synchronize()
        clock.free.clear()
    del device.TRANSFERS["cpu"]
    spans = [(op.stream, op.begin, op.end) for op in clock.trace]
    start = clock.trace[last].begin
    for op in clock.trace:
        op.begin, op.end = op.begin - start, op.end - start
    clock.trace = clock.trace[last:]
    return spans, clock.timeline()


def _loss(model: nn.Module, seed: int) -> torch.Tensor:
    loss: torch.Tensor = model(seed)
    return loss


def on_a_rank() -> dict[str, tuple[list[tuple[str, float, float]], str]]:
    return {name: scheduled(options) for name, options in WAYS.items()}


def events(found: list[dict[str, tuple[list[tuple[str, float, float]], str]]]) -> list[dict[str, Any]]:
    """In the format of Chrome's traces, in microseconds."""
    made: list[dict[str, Any]] = []
    for way, name in enumerate(WAYS):
        for rank, here in enumerate(found):
            process = 10 * way + rank
            made.append(_named("process", process, 0, f"rank {rank}: {name}"))
            spans, _ = here[name]
            streams = list(dict.fromkeys(stream for stream, _, _ in spans))
            made += [_named("thread", process, i, stream) for i, stream in enumerate(streams)]
            count = dict.fromkeys(streams, 0)
            for stream, begin, end in spans:
                label = f"{stream} {count[stream]}"
                count[stream] += 1
                span = {"ph": "X", "name": label, "ts": 1000 * begin, "dur": 1000 * (end - begin)}
                made.append({**span, "pid": process, "tid": streams.index(stream)})
    return made


def _named(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": f"{what}_name", "pid": process, "tid": thread, "args": {"name": name}}


def page(found: list[dict[str, tuple[list[tuple[str, float, float]], str]]]) -> str:
    lines = [
        "# An offloaded step on two ranks, simulated",
        "",
        f"`{SPEC}`, eight layers under `fully_shard`, two gloo ranks, a simulated device each: the second step.",
        "A column is a millisecond, which every operation takes. `offload_trace.json` beside this page is the same as",
        "a trace, for Perfetto. By `benchmarks/offload_trace.py`.",
    ]
    for name in WAYS:
        for rank, here in enumerate(found):
            lines += ["", f"Rank {rank}, {name}:", "", *_padded(here[name][1])]
    return "\n".join(lines) + "\n"


def _padded(timeline: str) -> list[str]:
    rows = [row.partition("|") for row in timeline.splitlines()]
    return [f"    {stream.strip():<8}|{rest}" for stream, _, rest in rows]


def main() -> int:
    found = ranks.run(on_a_rank, WORLD)
    write_result(RESULTS, {"displayTimeUnit": "ms", "traceEvents": events(found)}, flat=True)
    RESULTS.with_suffix(".md").write_text(page(found))
    print(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
