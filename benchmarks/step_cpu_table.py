"""What step_cpu.py has measured, as a table and as a picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

#: Bars of the issue, as ratios to torch's fused AdamW.
BARS = {
    "adamw-8bit": 0.9,
    "lion-8bit": 0.8,
    "adamw-4bit": 1.1,
    "adamw-bf16": 0.9,
    "adamw": 1.0,
    "adamw-8bit.factored": 0.8,
    "adamw-4bit.factored": 0.9,
    "adafactor": 1.5,
    "came": 2.0,
}
#: What else is measured, by what is put into the environment.
SETTINGS = {"all_large": {"THP_MEM_ALLOC_ENABLE": "1"}, "none_large": {"MEMOPT_HUGE_PAGES": "off"}}


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    bandwidth = report["copy_bandwidth"]
    lines = [
        f"{report['numel']:,} fp32 parameters, {report['threads']} threads, torch {report['torch']}, {report['cpu']}; "
        f"copy {bandwidth / 1e9:.0f} GB/s; {report['kernels']}. Load average {report['load_before']:.1f} before and "
        f"{report['load_after']:.1f} after; ratios are to the fused step of the same rounds.",
        "",
        "| step | ms | ratio to fused AdamW | of processes | all on large pages | none on large pages | bar | "
        "bytes per parameter | of copy bandwidth |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        nbytes = row["bytes_per_parameter"]
        bar = BARS.get(row["name"].removeprefix("memopt ").removesuffix(" (propagate)"), "")
        share = f"{nbytes * report['numel'] / (row['ms'] / 1e3) / bandwidth:.0%}" if nbytes else ""
        spread = f"{min(row['ratios']):.2f} … {max(row['ratios']):.2f}" if len(row["ratios"]) > 1 else ""
        settings = " | ".join(f"{statistics.median(row[s]):.2f}" if row.get(s) else "" for s in SETTINGS)
        lines.append(
            f"| {row['name']} | {row['ms']:.1f} | {row['ratio']:.2f} | {spread} | {settings} | {bar} | "
            f"{f'{nbytes:.1f}' if nbytes else ''} | {share} |"
        )
    if "small" in report:
        base = report["small"]["torch AdamW fused"]
        lines += ["", "500 tensors of 1000 elements:", "", "| step | ms | ratio |", "|---|---:|---:|"]
        lines += [f"| {name} | {ms:.2f} | {ms / base:.2f} |" for name, ms in report["small"].items()]
    if "scaling" in report:
        sizes = list(next(iter(report["scaling"].values())))
        head = " | ".join(f"{int(n):,}" for n in sizes)
        lines += ["", "Milliseconds against parameters:", "", f"| step | {head} |", "|---|" + "---:|" * len(sizes)]
        lines += [
            f"| {name} | " + " | ".join(f"{ms:.3g}" for ms in curve.values()) + " |"
            for name, curve in report["scaling"].items()
        ]
    return "\n".join(lines) + "\n"


def plot(curves: dict[str, dict[int, float]], path: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    for name, curve in curves.items():
        pyplot.loglog([int(n) for n in curve], list(curve.values()), marker="o", label=name)
    pyplot.xlabel("parameters")
    pyplot.ylabel("ms per step")
    pyplot.legend()
    pyplot.savefig(path, dpi=120)
