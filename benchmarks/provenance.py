"""What every benchmark's JSON carries: where it comes from, so that it can be made again."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: Packages whose version may matter to a figure, where they are installed.
PACKAGES = (
    "torch",
    "triton",
    "bitsandbytes",
    "deepspeed",
    "accelerate",
    "transformers",
    "peft",
    "lightning",
    "torchao",
    "flashoptim",
    "safetensors",
    "numpy",
    "diffusers",
    "timm",
    "torchvision",
    "scipy",
    "pillow",
)


def provenance() -> dict[str, Any]:
    """Commit (``+changes`` where the tree is not the commit's), processor, versions and command line.

    >>> sorted(provenance())
    ['command', 'commit', 'cores', 'processor', 'python', 'versions']
    """
    return {
        "commit": commit(),
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def commit(root: Path = ROOT) -> str:
    """The commit that is checked out, or "unknown" outside a repository."""
    try:
        head = _git("rev-parse", "HEAD", root=root)
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", root=root)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed else "")


def processor() -> str:
    """The processor's name, and the graphics card's where torch has one."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        name += f", {torch.cuda.get_device_name()}"
    return name


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_result(path: Path, result: dict[str, Any], flat: bool = False) -> None:
    """Write a result and its provenance as JSON; with ``flat`` one line for each key, for thousands of rows."""
    result = {"provenance": provenance(), **{k: v for k, v in result.items() if k != "provenance"}}
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + text + "\n}\n" if flat else json.dumps(result, indent=1) + "\n")


def write_docs(page: str, script: str, name: str, lines: list[str]) -> None:
    """Replace the table in ``docs/<page>`` between the comments that name it."""
    begin, end = f"<!-- benchmarks/{script}: {name} -->\n", f"<!-- {name}: end -->"
    path = ROOT / "docs" / page
    text = path.read_text()
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    if not rest or end not in rest:
        raise SystemExit(f"docs/{page} has no place for {name}")
    path.write_text(before + begin + "\n".join(lines) + "\n" + end + after)


def _git(*arguments: str, root: Path = ROOT) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
