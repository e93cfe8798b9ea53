"""An estimate and plans as the page shows them. Sums, shares and texts are made here, from the rows of the estimate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from estimators.memory.memory_row import FIGURES, GPU, PAGEABLE, PHASES
from estimators.planning.plan import Plan, Plans, title
from estimators.report.bars import KINDS
from estimators.report.text import SHOWN_BY, best, first_change, verdict
from estimators.result import Column, Estimate
from estimators.training import describe_training
from estimators.units import gib
from memopt.cli.estimate import DEFAULT_SPECS

#: What stands for a setting that was not given, in a sentence about a change.
_DEFAULTS = {"checkpointing": "none", "batch": "1", "accumulate": "1", "lora": "none", "quantised": "none"}
_WORDS = {"batch": "micro-batch", "accumulate": "accumulation", "lora": "LoRA rank", "quantised": "stored weights"}


def estimate_view(e: Estimate) -> dict[str, Any]:
    """Texts and bars of an estimate: the best column first to be shown, all of them on one scale of bytes."""
    counted = f"{e.parameters:,} parameters"
    trainable = "" if e.trainable == e.parameters else f"{e.trainable:,} of them trainable"
    dtypes = f"{e.weights} weights and gradients"
    if e.weights != e.gradients:
        dtypes = f"{e.weights} weights, {e.gradients} gradients"
    ranks = f"{e.world_size:,} data-parallel ranks, figures per GPU" if e.world_size > 1 else ""
    chosen = _chosen(e)
    change = f"{first_change(best(e), e)}" if e.fits is False else ""
    return {
        "title": e.model.name,
        "facts": [part for part in (counted, trainable, dtypes, describe_training(e.training), ranks) if part],
        "scale": max([c.high for c in e.columns] + [e.gpu or 0]) or 1,
        "gpu": e.gpu,
        "gpu_text": "" if e.gpu is None else gib(e.gpu),
        "chosen": e.columns.index(chosen),
        "summary": _summary(e, chosen),
        "change": change,
        "kinds": [kind for kind in KINDS if any(row.what == kind and row.nbytes for row in e.rows)],
        "columns": [_column(column, e) for column in e.columns],
        "without": list(e.without),
        "notes": list(e.model.notes),
    }


def _chosen(e: Estimate) -> Column:
    """The first spec with a good verdict, or else the one that needs least."""
    for wanted in ("FITS", "TIGHT"):
        for column in e.columns:
            if e.verdict(column) == wanted:
                return column
    return best(e)


def _summary(e: Estimate, column: Column) -> str:
    figures = f"{column.spec} takes {gib(column.process.expected)}, at most {gib(column.process.high)}"
    if e.gpu is None:
        return f"{figures}."
    said = {"FITS": "It fits", "TIGHT": "It is tight", "over": "It does not fit", "": "No verdict"}[e.verdict(column)]
    return f"{said}: {figures}, of {gib(e.gpu)}."


def _column(column: Column, e: Estimate) -> dict[str, Any]:
    at_peak = {kind: column.at_peak(kind) for kind in KINDS}
    return {
        "spec": column.spec,
        "verdict": e.verdict(column),
        "verdict_text": "" if e.gpu is None else verdict(column, e.gpu),
        "kinds": _kinds(at_peak),
        "nbytes": column.peak.nbytes,
        "text": gib(column.peak.nbytes),
        "high": column.high,
        "high_text": gib(column.high),
        "state_text": gib(column.nbytes("state")),
        "elsewhere": _elsewhere(column),
        "figures": [
            {"name": name, "bounds": [gib(n) for n in getattr(column, name)], "shown_by": SHOWN_BY[name]}
            for name in FIGURES
        ],
        "phases": [_phase(column, phase) for phase in PHASES],
    }


def _phase(column: Column, phase: str) -> dict[str, Any]:
    sizes = {
        kind: sum(r.nbytes for r in column.rows if r.what == kind and r.tier == GPU and phase in r.phases)
        for kind in KINDS
    }
    total = sum(sizes.values())
    peak = phase == column.peak.phase
    return {"phase": phase, "kinds": _kinds(sizes), "nbytes": total, "text": gib(total), "peak": peak}


def _kinds(sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    return [{"kind": kind, "nbytes": nbytes, "text": gib(nbytes)} for kind, nbytes in sizes.items() if nbytes]


def _elsewhere(column: Column) -> str:
    """State that is not in the GPU's figures."""
    pageable = column.nbytes("state", PAGEABLE)
    elsewhere = column.nbytes("state") - column.nbytes("state", GPU)
    if pageable:
        return f"{gib(pageable)} of state is pageable: it moves to the host while the GPU is full"
    return f"{gib(elsewhere)} of state is on the host or on disk" if elsewhere > 2**20 else ""


def plans_view(result: Plans, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The plans with what each changes of the settings, and the settings that it is."""
    return {"plans": [_plan(plan, settings) for plan in result.found], "sentences": _sentences(result)}


def _plan(plan: Plan, settings: Mapping[str, Any]) -> dict[str, Any]:
    column = plan.estimate.columns[0]
    patch = plan_settings(plan, settings)
    return {
        "title": title(plan),
        "why": f"{plan.why[0].upper()}{plan.why[1:]}.",
        "text": f"{gib(column.process.expected)}, at most {gib(column.process.high)}",
        "changes": _changes(patch, settings),
        "settings": patch,
    }


def plan_settings(plan: Plan, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the form holds where a plan is taken over; what a plan does not use becomes empty."""
    method = plan.method
    return {
        "optim": [plan.spec],
        "hyper": [],
        "seq": str(plan.estimate.training.seq),
        "batch": str(plan.micro_batch),
        "accumulate": str(plan.accumulate),
        "checkpointing": plan.checkpointing,
        "lora": str(method.lora) if method.lora else "",
        "quantised": method.quantised,
        "release_gradients": method.release,
        "offload_gradients": "true" if method.offload_gradients else "",
    }


def _changes(patch: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """A plan in words of change; empty where it is among what the settings compare."""
    changes = []
    if patch["optim"][0] not in settings.get("optim", DEFAULT_SPECS):
        changes.append(f"optimizer {patch['optim'][0]}")
    for name, default in _DEFAULTS.items():
        before, after = settings.get(name) or default, patch[name] or default
        if before != after:
            changes.append(f"{_WORDS.get(name, name)} {before} → {after}")
    if patch["release_gradients"] != bool(settings.get("release_gradients")):
        changes.append("gradients released in the backward pass" if patch["release_gradients"] else "gradients kept")
    if patch["offload_gradients"] != settings.get("offload_gradients", ""):
        changes.append("gradients offloaded" if patch["offload_gradients"] else "gradients not offloaded")
    return changes


def _sentences(result: Plans) -> list[str]:
    if not result.found:
        said = ["Nothing fits this card, not even adapters on 4-bit weights."]
    else:
        said = [
            f"With the first: micro-batches of up to {result.largest_batch:,} at this length, or up to about "
            f"{result.longest_seq:,} tokens in a micro-batch of 1."
        ]
    for spec, ranks in (("adamw/zero1", result.ranks), ("adamw/zero3", result.ranks_zero3)):
        count = "no number of GPUs up to 1,024" if ranks is None else f"{ranks:,} GPU{'s' if ranks > 1 else ''}"
        said.append(f"32-bit AdamW, sharded ({spec}), fits on {count} like this one.")
    return [*said, f"8 GiB more would buy: {result.more}."]
