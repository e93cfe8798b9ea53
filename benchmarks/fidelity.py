"""How far the update of a format is from that of fp32 state, on the same gradients.

    python benchmarks/fidelity.py                  what is missing in benchmarks/results/fidelity.json, then the tables
    python benchmarks/fidelity.py --only noise,drop --again          these streams once more
    python benchmarks/fidelity.py --specs adamw-8bit --only noise    to the terminal, nothing is written

Every optimizer gets the same stream of gradients of one matrix (``fidelity_streams.py``), with a rate of 1, and its
parameter is set back to zero before each step: what stands there after the step is the update u. Against u32 of
torch.optim.AdamW in fp32, over the second half of the stream:

    error    |u - u32| / |u32|, of all steps together
    length   <u, u32> / <u32, u32> - 1: how much too long a step is in the direction that it should have
    largest  the largest |u| over the largest |u32|

``fidelity_long.py`` has what takes longer: whether second moments follow, stay right, and what periods do. Results go
into fidelity.json stream by stream, and the tables into fidelity.md and docs/formats.md.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # torchao compiles its step, which takes longer than all of this

import torch
from fidelity_long import LONG
from fidelity_streams import COLS, ROWS, STEPS, STREAMS, Stream
from provenance import write_docs, write_result

import memopt

SPECS = (
    "adamw-bf16",
    "adamw-8bit",
    "adamw-fp8",
    "adamw-8bit.4bit",
    "adamw-4bit",
    "adamw-factored",
    "adamw-8bit.factored",
    "adamw-4bit.factored",
    "bitsandbytes 8bit",
    "torchao 8bit",
    "torchao 4bit",
)
#: (stream, beta2), beside every stream at 0.999.
BETAS = [(name, beta2) for beta2 in (0.95, 0.99, 0.9999) for name in ("noise", "spread of 100", "drop")]
RESULTS = Path(__file__).parent / "results"
PLACE = "formats.md", "fidelity.py"
FIGURES = {
    "error": "Error of the update, |u − u32| / |u32|",
    "length": "Length of the update in its direction, ⟨u, u32⟩ / ⟨u32, u32⟩ − 1",
    "largest": "Longest update of an element, over the longest of fp32",
}
#: Of these the manual has the table.
SHOWN = ("adamw-bf16", "adamw-8bit", "adamw-8bit.4bit", "adamw-8bit.factored", "adamw-4bit", "adamw-4bit.factored")
PEERS = ("bitsandbytes 8bit", "torchao 8bit", "torchao 4bit")


def optimizer(spec: str, p: torch.Tensor, betas: tuple[float, float]) -> torch.optim.Optimizer | None:
    """None where the package is not here or does not run on this processor."""
    common: dict[str, Any] = {"lr": 1.0, "betas": betas, "weight_decay": 0.0}
    try:
        if spec == "fp32":
            return torch.optim.AdamW([p], **common)
        if spec.startswith("torchao"):
            from torchao.optim import AdamW4bit, AdamW8bit

            return (AdamW4bit if "4bit" in spec else AdamW8bit)([p], **common)
        if spec.startswith("bitsandbytes"):
            return memopt.create([p], "adamw-8bit", engine="bitsandbytes", **common)
        return memopt.create([p], spec, **common)
    except ImportError as error:
        print(f"{spec}: {error}", file=sys.stderr)
        return None


def measure(stream: Stream, specs: list[str], betas: tuple[float, float], steps: int) -> dict[str, dict[str, float]]:
    """What is said above of each spec."""
    params = {spec: torch.nn.Parameter(torch.zeros(ROWS, COLS)) for spec in ("fp32", *specs)}
    made = {spec: optimizer(spec, p, betas) for spec, p in params.items()}
    sums = {spec: torch.zeros(4, dtype=torch.float64) for spec in params}
    for step, g in zip(range(steps), stream, strict=False):
        exact = torch.zeros(0)
        for spec, p in params.items():
            opt = made[spec]
            if opt is None:
                continue
            p.data.zero_()
            p.grad = g.clone()
            opt.step()
            if step < steps // 2:
                continue
            u = p.detach().double()
            if spec == "fp32":
                exact = u.clone()
            found = sums[spec]
            found[0] += (u - exact).square().sum()
            found[1] += (u * exact).sum()
            found[2] += exact.square().sum()
            found[3] = found[3].maximum(u.abs().max())
    largest = float(sums["fp32"][3])
    return {
        spec: {
            "error": float((found[0] / found[2]).sqrt()),
            "length": float(found[1] / found[2] - 1),
            "largest": float(found[3]) / largest,
        }
        for spec, found in sums.items()
        if spec != "fp32" and made[spec] is not None
    }


def table(results: dict[str, dict[str, dict[str, float]]], figure: str, specs: tuple[str, ...]) -> list[str]:
    lines = ["| stream | " + " | ".join(specs) + " |", "|---|" + "--:|" * len(specs)]
    form = "+.3f" if figure == "length" else ".2f" if figure == "largest" else ".3f"
    for name, found in results.items():
        cells = (format(found[spec][figure], form) if spec in found else "" for spec in specs)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def write(record: dict[str, Any], out: Path) -> None:
    write_result(out / "fidelity.json", record)
    lines = ["# The update of each format against that of fp32", ""]
    for figure, title in FIGURES.items():
        lines += [f"## {title}", "", *table(record["streams"], figure, SPECS), ""]
    for name, (title, _, page, _) in LONG.items():
        if name in record:
            lines += [f"## {title}", "", *page(record[name]), ""]
    (out / "fidelity.md").write_text("\n".join(lines))
    if out != RESULTS:
        return
    write_docs(*PLACE, "fidelity", table(record["streams"], "error", (*SHOWN, *PEERS)))
    for name, (_, _, page, shown) in LONG.items():
        if name in record and shown:
            write_docs(*PLACE, name, page(record[name]))


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="streams or parts, with commas between them")
    parser.add_argument("--specs", default="", help="specs, with commas between them: to the terminal alone")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a stream; the long runs are as much shorter")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for fidelity.json and fidelity.md")
    parser.add_argument("--beta2", type=float, nargs="*", help="with --specs")
    parser.add_argument("--again", action="store_true", help="also what is in the results already")
    args = parser.parse_args()
    torch.set_num_threads(1)
    wanted = args.only.split(",") if args.only else None
    if args.specs:
        for beta2 in args.beta2 or [0.999]:
            for name in wanted or STREAMS:
                found = measure(STREAMS[name](), args.specs.split(","), (0.9, beta2), args.steps)
                print(
                    f"{name:>16} {beta2:<6}",
                    {s: [round(x, 3) for x in v.values()] for s, v in found.items()},
                    flush=True,
                )
        return 0
    path = args.out / "fidelity.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"steps": args.steps, "streams": {}}
    for name, beta2 in [*((name, 0.999) for name in STREAMS), *BETAS]:
        label = name if beta2 == 0.999 else f"{name}, β2 {beta2:g}"
        if (wanted is None or label in wanted) and (args.again or label not in record["streams"]):
            record["streams"][label] = measure(STREAMS[name](), list(SPECS), (0.9, beta2), args.steps)
            print(label, {s: round(v["error"], 3) for s, v in record["streams"][label].items()}, flush=True)
            write_result(path, record)
    for name, (_, run, page, _) in LONG.items():
        if (wanted is None or name in wanted) and (args.again or name not in record):
            record[name] = run(optimizer, args.steps / STEPS)
            print("\n".join(page(record[name])), flush=True)
            write_result(path, record)
    write(record, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
