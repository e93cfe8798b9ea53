"""What estimates_architectures.py has found, as tables."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from textwrap import fill
from typing import Any

BATCH, SEQ = 2, 64
#: Where what is found is told, between two marks.
DOCUMENT = Path(__file__).parent.parent / "docs" / "any-model.md"
_MARKS = "<!-- benchmarks/results/estimates_architectures.json -->", "<!-- end -->"


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
            "convolutions and products allocate and free inside of themselves (operands copied in another order)",
            "is measured too: it is a CPU's, and is not estimated.",
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


def told(done: dict[str, Any]) -> str:
    """The figures as the documentation has them."""
    types, steps, versions = done["types"], done.get("steps", []), done["provenance"]["versions"]
    exact, known = [r for r in types if r.get("exact")], [r for r in types if "saved" in r]
    given, unbuilt = [r for r in types if "given" in r], [r for r in types if "parameters" not in r]
    looked = [r for r in types if "saved" in r or "refused" in r]
    text = [
        f"`benchmarks/estimates_architectures.py` holds this to transformers {versions['transformers']}, and writes "
        f"`benchmarks/results/estimates_architectures.md`. Of its {len(types)} types {len(exact)} "
        f"({len(exact) / len(types):.1%}) are priced exactly, parameter for parameter as the module on the meta device "
        f"({len(given)} with a field that their defaults leave out). {len(unbuilt)} are listed with the reason: "
        "transformers has a configuration and no model, or does not build their defaults. "
        f"{'All' if len(looked) == len(types) else len(looked)} were looked at for activations, of one step of "
        f"{BATCH} x {SEQ} tokens or of what the model takes in their place: {len(known)} "
        f"({len(known) / len(types):.1%}) have them.",
        *([_steps(steps)] if steps else []),
        *([_families(done["families"])] if done.get("families") else []),
    ]
    return "\n\n".join(fill(one, 119, break_long_words=False, break_on_hyphens=False) for one in text)


def _steps(steps: list[dict[str, Any]]) -> str:
    ran = [r for r in steps if "saved_nbytes" in r]
    saved = [r for r in ran if abs(r["saved_error"]) < 0.01]
    peak = [r for r in ran if abs(r["peak_error"]) < 0.05]
    missed = Counter(r["type"] for r in ran if r not in saved or r not in peak)
    return (
        f"Beside {len(ran)} real steps of small models of {len({r['type'] for r in ran})} types in bf16 on a CPU, with "
        f"and without checkpointing, saved bytes are within 1 % in {len(saved)} and the peak of tensors is within 5 % "
        f"in {len(peak)}"
        + (
            f"; the {'other is' if len(missed) == 1 else 'others are'} {', '.join(sorted(missed))}. "
            if missed
            else ". "
        )
        + "oneDNN's convolutions and products allocate and free memory inside of themselves, for operands in another "
        "order and for "
        "sums, up to several times a small vision model's activations. It is measured apart, and not estimated: on a "
        "card the library's workspace is in its place."
    )


def _of(near: int, count: int) -> str:
    return f"All {count} steps agree" if near == count else f"Of {count} steps {near} agree"


def _families(rows: list[dict[str, Any]]) -> str:
    both = [r for r in rows if "saved" in r]
    columns = ("saved", "peak", "accumulated")
    far = {r["family"]: r for r in both if any(abs(r[f"{c}_difference"]) >= 0.005 for c in columns)}
    most = max((abs(r[f"{c}_difference"]) for r in far.values() for c in columns), default=0.0)
    near = len(both) - len([r for r in both if any(abs(r[f"{c}_difference"]) >= 0.005 for c in columns)])
    return (
        f"`--families` lays traced steps beside the formulas of the {len({r['family'] for r in both})} families that "
        f"have both, with and without checkpointing. {_of(near, len(both))} within 0.5 % in saved bytes, "
        "peak and peak with all gradients there"
        + (f"; {', '.join(sorted(far))} (checkpointed) differ by up to {most:.1%}." if far else ".")
    )


def documented(text: str, done: dict[str, Any]) -> str:
    """The document with the figures between its marks."""
    before, _, rest = text.partition(_MARKS[0])
    _, _, after = rest.partition(_MARKS[1])
    return f"{before}{_MARKS[0]}\n{told(done)}\n{_MARKS[1]}{after}"


def _line(kind: str, why: str) -> str:
    return f"{kind} ({why[:160]})" if kind else why[:200].replace("|", "/")
