"""Muon's usual fault: a rate that belongs to another scaling of it, or that a rule without one has too."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from memopt.diagnosis.readings import LARGE_STEP, Finding, History

#: From here on a rate is one of Muon's with its original scaling.
LARGE_MUON = 5e-3
#: At one rate AdamW moves a matrix about sqrt(width) times as far as Muon does without the scaling that matches both;
#: norms and biases, which are large, less far.
MISMATCH = 2.0


def muon(h: History) -> Iterator[Finding]:
    """Rates of Muon's that are meant for another scaling of it, or shared with a rule that has none."""
    if not h.readings or not h.muon:
        return
    reading = h.readings[-1]
    rest = [g for g in reading.groups if g.group not in h.muon and g.update_ratio]
    for g in reading.groups:
        if g.group not in h.muon or not g.update_ratio:
            continue
        mine, scaling = g.update_ratio, h.muon[g.group]
        who = f"group {g.group} ({g.names})"
        shared = [o for o in rest if o.lr == g.lr]
        others = median([o.update_ratio or 0.0 for o in shared]) if shared else 0.0
        numbers = {o.group for o in shared}
        furthest = max((o.update_ratio or 0.0 for r in h.readings for o in r.groups if o.group in numbers), default=0.0)
        moved = f"step {reading.step} moved its weights by"
        if scaling == "match_rms_adamw":
            if g.lr >= LARGE_MUON and mine > LARGE_STEP:
                yield Finding(
                    "rate of muon",
                    f"{who} has lr={g.lr:.3g} under adjust_lr_fn='match_rms_adamw', where Muon's rates are AdamW's "
                    f"(1e-4 to 3e-3), and {moved} {mine:.0%} of their size: 0.02 is the usual rate of "
                    "adjust_lr_fn='original'",
                    reading.step,
                )
                return
        elif furthest > LARGE_STEP and g.lr >= LARGE_MUON:
            yield Finding(
                "rate of muon's fallback",
                f"group {shared[0].group} ({shared[0].names}) has Muon's rate {g.lr:.3g} (adjust_lr_fn={scaling!r}), "
                f"and a step moved its weights by {furthest:.0%} of their size: give it a rate of its "
                "own, rules={'adamw': {'lr': 3e-4}}, or scale Muon's steps as AdamW's, adjust_lr_fn='match_rms_adamw'",
                reading.step,
            )
            return
        elif others > MISMATCH * mine and g.lr < LARGE_MUON:
            yield Finding(
                "rate of muon",
                f"{who} has AdamW's rate {g.lr:.3g} under adjust_lr_fn={scaling!r}, whose rates are about 0.02: {moved}"
                f" {mine:.2%} of their size where the others moved by {others:.2%}. Raise its rate, or take "
                "adjust_lr_fn='match_rms_adamw'",
                reading.step,
            )
            return
