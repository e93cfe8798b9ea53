"""What step_gpu.py has measured, as a table."""

from __future__ import annotations

from typing import Any


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    bandwidth, numel = report["copy_bandwidth"], report["numel"]
    rows = report["rows"]
    checked = {(row["name"].split()[1], row["dtype"]): row["agrees"] for row in rows if row.get("agrees") is not None}
    lines = [
        f"{report['device']}, torch {report['torch']}, Triton {report['triton']}; {numel:,} parameters in "
        f"{report['tensors']} tensors; copy {bandwidth / 1e9:,.0f} GB/s. {sum(checked.values())} of {len(checked)} "
        "pairs of spec and dtype agree with the plain torch path; one that does not is not timed.",
        *([f"Stopped: {report['stopped']}"] if report.get("stopped") else []),
        "",
        "| step | parameters | ms | bytes per parameter | of copy bandwidth | peak above state |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "left_out" in row:
            lines.append(f"| {row['name']} | {row['dtype']} | {row['left_out']} | | | |")
            continue
        nbytes = row["bytes_per_parameter"]
        share = f"{nbytes * numel / (row['ms'] / 1e3) / bandwidth:.0%}" if nbytes else ""
        lines.append(
            f"| {row['name']} | {row['dtype']} | {row['ms']:.2f} | {f'{nbytes:.1f}' if nbytes else ''} | "
            f"{share} | {row['peak_above_state'] / 2**20:,.1f} MiB |"
        )
    return "\n".join(lines) + "\n"
