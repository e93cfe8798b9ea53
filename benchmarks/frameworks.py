"""The same small script under accelerate, transformers' Trainer, Lightning and DeepSpeed against the bare one.

python benchmarks/frameworks.py            writes benchmarks/results/frameworks.json and .md
"""

from __future__ import annotations

import sys
import tempfile
from argparse import ArgumentParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from provenance import write_result

from tests.helpers import frameworks, loops

PACKAGES = ("torch", "accelerate", "transformers", "lightning", "deepspeed")


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="frameworks that contain this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    rows = []
    for case in (case for case in frameworks.CASES if args.only in case.framework):
        with tempfile.TemporaryDirectory() as folder:
            found = case.run(folder)
        refused = found["refused"][0]
        right = case.refused in refused and bool(refused) == bool(case.refused)
        right &= found.get("difference", 0.0) <= case.rtol and (bool(refused) or found["resumed"])
        rows.append(
            {
                "framework": case.framework,
                "ranks": case.ranks,
                "spec": case.spec,
                "bar": case.rtol,
                **found,
                "refused": refused,
                "right": right,
            }
        )
        print(rows[-1], flush=True)
    record = {"versions": {name: version(name) for name in PACKAGES}, "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    write_result(args.out / "frameworks.json", record)
    (args.out / "frameworks.md").write_text(page(record))
    print(page(record))
    return 0 if all(row["right"] for row in rows) else 1


def page(record: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {found}" for name, found in record["versions"].items())
    lines = [
        "# Under other people's loops",
        "",
        f"{loops.STEPS} batches, two to a step, clipped, against the bare script; a checkpoint in the middle. "
        f"gloo; {packages}. Written by `benchmarks/frameworks.py`.",
        "",
        "| framework | processes | spec | largest relative difference of a loss | on from the checkpoint |",
        "|---|---|---|---|---|",
    ]
    for r in record["rows"]:
        difference = f"{r['difference']:.1e}" if "difference" in r else ""
        goes_on = "bit for bit" if r.get("resumed") else f"refused: {r['refused'].partition(';')[2].strip()}"
        lines.append(f"| {r['framework']} | {r['ranks']} | `{r['spec']}` | {difference} | {goes_on} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
