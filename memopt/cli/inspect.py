"""What is in a checkpoint: spec, bytes by part, and the health of every moment.

PATH is a checkpoint of memopt.save (or a folder of them: the newest), a file that torch.save wrote with an optimizer's
state_dict(), alone or in a checkpoint with more (Trainer's optimizer.pt, accelerate's optimizer.bin, Lightning's,
nanoGPT's), or a folder of DeepSpeed or torch.distributed.checkpoint. The exit code is 0 if all is well, 1 if state
holds NaN or Inf, 2 if it cannot be used.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from memopt.cli.output import terminal
from memopt.cli.output.progress import bar
from memopt.untrusted.text import printable

SUMMARY = "what is in a checkpoint, and whether its numbers are healthy"

#: Width of the histograms, in characters, and their bars.
BARS = " ▁▂▃▄▅▆▇█"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a checkpoint, a folder of them, or another tool's file or folder")
    parser.add_argument("--from", metavar="RULE", dest="rule", help="the rule, where the file does not say it")
    parser.add_argument("--json", action="store_true", help="print the same as JSON")


def run(args: Namespace) -> int:
    from memopt.checkpoint.health import examine
    from memopt.cli.convert import open_source

    source, checkpoint = open_source(Path(args.path), args.rule)
    with bar("examining", None) as advance:
        found = examine(source, advance)
    head = {
        "schema": "memopt.inspect/1",
        "path": source.origin,
        "spec": source.label or str(source.spec),
        "step": int(max((r.step for r in source.records.values()), default=0)),
        "parameters": len(source.records),
        "files": {name: info["nbytes"] for name, info in checkpoint.body["files"].items()} if checkpoint else {},
    }
    if args.json:
        import json

        print(json.dumps({**head, "moments": [moment.to_json() for moment in found]}, indent=2))
    else:
        print(terminal.folded(map(printable, _text(head, found))))
    return 1 if any(moment.non_finite for moment in found) else 0


def _text(head: dict[str, Any], found: list[Any]) -> list[str]:
    lines = [f"{head['path']}", f"  {head['spec']}, step {head['step']}, {head['parameters']} parameters"]
    lines += [f"  {name}: {nbytes:,} bytes, checksums right" for name, nbytes in head["files"].items()]
    for moment in found:
        parts = ", ".join(f"{part or 'values'} {nbytes:,}" for part, nbytes in moment.nbytes.items())
        lines += [
            "",
            f"{moment.name} ({moment.format}): {moment.numel:,} elements in {moment.tensors} tensors; bytes: {parts}",
            f"  NaN or Inf {moment.non_finite:,}, zeros {moment.zeros:,}, blocks whose scale is zero "
            f"{moment.zero_scales:,} of {moment.scales:,}",
        ]
        if moment.worst:
            lines.append(f"  not finite in: {', '.join(moment.worst[:5])}" + (", …" if len(moment.worst) > 5 else ""))
        lines.append(f"  |x| from 1e{moment.FIRST} to 1e{moment.LAST}: [{_histogram(moment.decades)}]")
    return lines


def _histogram(counts: list[int]) -> str:
    top = max(max(counts), 1)
    return "".join(BARS[-(-count * (len(BARS) - 1) // top)] for count in counts)
