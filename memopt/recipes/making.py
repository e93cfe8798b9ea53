"""``memopt.recipe``: from a name to optimizer, groups, schedule and clipping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from memopt.core.hyperparameters import SpecError
from memopt.recipes.published import PUBLISHED
from memopt.training.schedules import KINDS, NEEDS_TOTAL

if TYPE_CHECKING:
    import torch

    from memopt.recipes.training import BuiltRecipe

#: What decays: ``matrices`` is :func:`memopt.param_groups`, ``weights`` also embeddings, ``all`` everything.
DECAYS = ("matrices", "weights", "all")

#: Fields that are not values of a run, or are made of the others.
_FIXED = {"name", "summary", "source", "notes", "batch", "hyper", "schedule", "given"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A published recipe: look at it with ``print``, change it with :meth:`override`, use it with :meth:`build`."""

    name: str
    summary: str
    source: str
    spec: str
    lr: float
    weight_decay: float
    kind: str  # of the schedule
    clip_norm: float | None
    hyper: Mapping[str, Any] = field(default_factory=dict)
    warmup: int | float = 0
    total_steps: int | None = None
    floor: float = 0.0
    schedule: Mapping[str, Any] = field(default_factory=dict)  # further keywords of memopt.schedule
    decays: str = "matrices"
    batch: str = ""  # for the reader: a recipe does not make batches
    notes: str = ""
    given: frozenset[str] = frozenset()  # what is not the published value

    def override(self, **changes: Any) -> Recipe:
        """The recipe with other values: its own fields, keywords of its schedule, hyperparameters of its rule.

        Another ``total_steps`` keeps the shape: a warm-up (or hold) that was published in steps takes the same share of
        them, unless it is given too. Raises SpecError for a name that nothing here has.
        """
        own = {f.name for f in fields(self)} - _FIXED
        kind = changes.get("kind", self.kind)
        if kind not in KINDS:
            raise SpecError(f"unknown schedule {kind!r}; allowed: {', '.join(KINDS)}")
        of_schedule = {*KINDS[kind][1], "decay_with_rate"}
        mine = {k: v for k, v in changes.items() if k in own}
        timing = {k: v for k, v in changes.items() if k in of_schedule}
        hyper = {k: v for k, v in changes.items() if k not in mine and k not in timing}
        schedule = {k: v for k, v in self.schedule.items() if k in of_schedule}
        given = self.given | changes.keys()
        scaled = self._scaled(mine.get("total_steps"), given, schedule)
        made = {"given": given, **scaled, **mine, "schedule": {**schedule, **scaled.get("schedule", {}), **timing}}
        return replace(self, **made, hyper={**self.hyper, **hyper})

    def _scaled(self, steps: Any, given: frozenset[str], schedule: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(steps, int) or not self.total_steps:
            return {}
        share = steps / self.total_steps
        found: dict[str, Any] = {}
        if isinstance(self.warmup, int) and self.warmup and "warmup" not in given:
            found["warmup"] = max(round(self.warmup * share), 1)
        if "hold" in schedule and "hold" not in given:
            found["schedule"] = {"hold": max(round(schedule["hold"] * share), 1)}
        return found

    def build(self, model: torch.nn.Module, **changes: Any) -> BuiltRecipe:
        """Optimizer, groups, schedule and clipping for this model; ``changes`` as of :meth:`override`, and keywords of
        :func:`memopt.create` and :func:`memopt.param_groups` (``overrides``, ``rates``, ``no_decay`` …)."""
        from memopt.recipes.training import build

        return build(self, model, changes)

    def check(self) -> None:
        """Raise SpecError for what cannot be built."""
        if self.decays not in DECAYS:
            raise SpecError(f"decays={self.decays!r} is not allowed; it must be one of {', '.join(DECAYS)}")
        if self.total_steps is None and (self.kind in NEEDS_TOTAL or isinstance(self.warmup, float)):
            raise SpecError(f"the recipe {self.name!r} depends on the length of the run: give total_steps")

    def __str__(self) -> str:
        hyper = ", ".join(f"{k}={v}" for k, v in self.hyper.items())
        warmup = f"{self.warmup:.0%} of the steps" if isinstance(self.warmup, float) else f"{self.warmup:,} steps"
        steps = f" over {self.total_steps:,} steps" if self.total_steps else ""
        extra = "".join(f", {k} {v}" for k, v in self.schedule.items())
        rows = {
            self.name: self.summary,
            "optimizer": f"{self.spec}, lr={self.lr:g}, weight_decay={self.weight_decay:g} of {self.decays}, {hyper}",
            "schedule": f"{self.kind}{steps}, warm-up {warmup if self.warmup else 'none'}, floor {self.floor:g}{extra}",
            "clipping": f"global norm {self.clip_norm:g}" if self.clip_norm else "no global norm",
            "batch": self.batch,
            "source": self.source,
            "notes": self.notes,
        }
        return "\n".join(f"{label:<15} {text}" for label, text in rows.items() if text)


def recipe(name: str, **changes: Any) -> Recipe:
    """The published recipe of this name, with other values where ``changes`` says so.

    Args:
        name: As ``memopt list recipes`` shows them.
        changes: As of :meth:`Recipe.override`: ``lr``, ``weight_decay``, ``clip_norm``, ``warmup``, ``total_steps``,
            ``floor`` …, keywords of :func:`memopt.schedule`, hyperparameters of the rule.

    Returns:
        A :class:`Recipe`; ``print`` shows it, :meth:`Recipe.build` makes optimizer, groups, schedule and clipping.

    Raises:
        SpecError: for an unknown name, and for a keyword that nothing in the recipe has.

    >>> recipe("llama-2-7b").lr, recipe("llama-2-7b", lr=1e-4, total_steps=1000).warmup
    (0.0003, 4)
    """
    if name not in PUBLISHED:
        from difflib import get_close_matches

        near = get_close_matches(str(name).lower(), PUBLISHED, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(PUBLISHED)}"
        raise SpecError(f"unknown recipe {name!r}; {hint}")
    found = Recipe(name=name, **PUBLISHED[name])
    return found.override(**changes) if changes else found
