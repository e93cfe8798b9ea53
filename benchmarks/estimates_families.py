"""Traced steps of every family beside its formulas."""

from __future__ import annotations

import time
from typing import Any


def families() -> list[dict[str, Any]]:
    """Traced steps beside the formulas, for every family that has both."""
    from estimates_models import FAMILIES, ONLY_EAGER, SIZES, config

    from estimators.memory.step_rows import run
    from estimators.models.from_config import from_config
    from estimators.traced.from_transformers import from_transformers
    from estimators.training import Training

    rows = []
    for family in FAMILIES:
        for how in ("none", "full"):
            cfg = config(family, SIZES[0][0])
            attention = "eager" if family in ONLY_EAGER else "sdpa"
            # A ViT's tokens are its patches, and one more: a traced step has them, a formula is told.
            seq = (cfg["image_size"] // cfg["patch_size"]) ** 2 + 1 if family == "vit" else 64
            asked = Training(batch=4, seq=seq, checkpointing=how, attention=attention)
            formula, _ = run(from_config(cfg, family), asked)
            start = time.process_time()
            traced, why = run(from_transformers(cfg, family), asked)
            row = {"family": family, "checkpointing": how, "seconds": round(time.process_time() - start, 2)}
            if formula is None or traced is None:
                rows.append({**row, "refused": why})
                continue
            # Masks and tables of positions that checkpointed layers are called with are no saved tensors of the
            # formula's, but there.
            called = formula.walked.tables + formula.walked.called if how != "none" and formula.walked else 0
            pairs = {
                "saved": (formula.saved + called, traced.saved),
                "peak": (max(formula.loss[0], sum(formula.backward)), max(traced.loss[0], sum(traced.backward))),
                "accumulated": (formula.accumulated[0], traced.accumulated[0]),
            }
            for name, (a, b) in pairs.items():
                row |= {name: a, f"{name}_traced": b, f"{name}_difference": round(b / a - 1, 5)}
            rows.append(row)
            print(row, flush=True)
    return rows
