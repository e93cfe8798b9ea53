"""What estimates_architectures.py has found, as tables."""

from __future__ import annotations

from typing import Any

BATCH, SEQ = 2, 64


def table(done: dict[str, Any]) -> str:
    types, steps = done.get("types", []), done.get("steps", [])
    built = [r for r in types if "parameters" in r]
    looked = [r for r in types if "saved" in r or ("refused" in r and "priced" in r)]
    exact, known = [r for r in types if r.get("exact")], [r for r in types if "saved" in r]
    refused = [r for r in types if "refused" in r]
    lines = [
        "# transformers' types",
        "",
        f"{done.get('known', 0)} types, each with its default configuration, in the order of a draw (seed",
        f"{done.get('seed', 0)}, the CRC-32 of transformers' version):",
        "",
        f"- {len(types)} were priced: {len(exact)} exactly, parameter for parameter the module on the meta device;",
        f"  {len(types) - len(built)} are not built by transformers itself from their defaults, with what is installed",
        f"- a step of {len(looked)} of them was traced: {len(known)} have activations ({BATCH} x {SEQ} tokens, or what",
        "  the model takes in their place; with few layers, where transformers builds that), "
        f"{len([r for r in known if r.get('weights') == 'float32'])} with weights",
        "  in fp32, where transformers' own code fails in bf16",
        f"- {len([r for r in types if 'given' in r])} are given a field that their defaults leave out, as their "
        "documentation's examples have it",
        "",
    ]
    if steps:
        ran = [r for r in steps if "saved_nbytes" in r]
        saved = [r for r in ran if abs(r["saved_error"]) < 0.01]
        peak = [r for r in ran if abs(r["peak_error"]) < 0.05]
        drawn = {r["type"] for r in ran} & set(done.get("drawn", []))
        both = [r for r in ran if r in saved and r in peak]
        lines += [
            "## Real steps",
            "",
            f"{len(ran)} steps of {len({r['type'] for r in ran})} types in bf16 on the CPU, of the draw ({len(drawn)})",
            f"and of those that are always run: {len(saved)} have saved bytes within 1 %, {len(peak)} the peak within",
            f"5 %, {len(both)} both.",
            "*Saved* is what the forward pass leaves (inputs, and what autograd and checkpointing keep), *peak* that",
            "of all tensors, *moving* the peak without weights. *With scratch* is the difference where what oneDNN's",
            "convolutions allocate and free inside of themselves is measured too: it is a CPU's, and is not estimated.",
            "",
            "| type | checkpointing | saved, bytes | error | peak, bytes | error | moving | with scratch |",
            "|---|---|---|---|---|---|---|---|",
            *(
                f"| {r['type']} | {r['checkpointing']} | {r['saved_nbytes']:,} | {r['saved_error']:+.2%} | "
                f"{r['peak_nbytes']:,} | {r['peak_error']:+.2%} | {r['moving_error']:+.2%} | "
                + (f"{r['with_scratch_error']:+.2%} |" if "with_scratch_error" in r else "|")
                for r in ran
            ),
            "",
            "Not run: " + "; ".join(_line(r["type"], r["not_run"]) for r in steps if "not_run" in r),
            "",
        ]
    if done.get("families"):
        both = [r for r in done["families"] if "saved" in r]
        columns = ("saved", "peak", "accumulated")
        near = [r for r in both if all(abs(r[f"{c}_difference"]) < 0.005 for c in columns)]
        lines += [
            "## Traced steps beside formulas",
            "",
            f"{len(both)} steps of {len({r['family'] for r in both})} families; {len(near)} agree within 0.5 % in all",
            "three. *Accumulated* is the fullest moment where gradients are all there.",
            "",
            "| family | checkpointing | saved | peak | accumulated |",
            "|---|---|---|---|---|",
            *(
                f"| {r['family']} | {r['checkpointing']} | "
                + " | ".join(f"{r[f'{c}_difference']:+.2%}" for c in columns)
                + " |"
                for r in both
            ),
            "",
        ]
    lines += ["## Refused", "", "| type | class | why |", "|---|---|---|"]
    lines += [f"| {r['type']} | {r.get('class', '')} | {_line('', r.get('refused', ''))} |" for r in refused]
    return "\n".join([*lines, ""])


def _line(kind: str, why: str) -> str:
    return f"{kind} ({why[:160]})" if kind else why[:200].replace("|", "/")
