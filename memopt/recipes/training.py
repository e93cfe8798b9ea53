"""A recipe at work: what :meth:`memopt.recipes.Recipe.build` returns."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from memopt.core.hyperparameters import SpecError
from memopt.core.param_kinds import kinds
from memopt.factory import create
from memopt.keywords import Hyperparameters, OptimizerKeywords
from memopt.optimizer import Optimizer
from memopt.training.clip import clip_grad_norm_
from memopt.training.param_groups import param_groups
from memopt.training.schedules import schedule

#: Keywords that go to the grouping of parameters.
GROUPING = set(signature(param_groups).parameters) - {"model", "weight_decay", "lr", "decay_embeddings"}
#: Keywords that go to the optimizer itself and are no hyperparameters.
CREATING = OptimizerKeywords.__annotations__.keys() - Hyperparameters.__annotations__.keys()


class BuiltRecipe(NamedTuple):
    """``recipe`` is what was built, with every value; the parts can be used alone, or all of them by :meth:`step`."""

    recipe: Any  # a memopt.recipes.Recipe
    optimizer: Optimizer
    scheduler: LRScheduler

    def clip(self) -> Tensor | None:
        """Clip all gradients to the recipe's global norm; returns the norm before, None where the recipe has none."""
        return None if self.recipe.clip_norm is None else clip_grad_norm_(self.optimizer, self.recipe.clip_norm)

    def step(self) -> Tensor | None:
        """After ``loss.backward()``: clip, step, next rate, gradients to None. Returns what :meth:`clip` does."""
        norm = self.clip()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return norm


def build(published: Any, model: nn.Module, changes: Mapping[str, Any]) -> BuiltRecipe:
    """See :meth:`memopt.recipes.Recipe.build`."""
    grouping = {k: v for k, v in changes.items() if k in GROUPING}
    creating = {k: v for k, v in changes.items() if k in CREATING}
    recipe = published.override(**{k: v for k, v in changes.items() if k not in grouping and k not in creating})
    recipe.check()
    if recipe.clip_norm is not None and not recipe.clip_norm > 0:
        raise SpecError(f"clip_norm={recipe.clip_norm!r} is not allowed; it must be a number > 0, or None")
    groups = _groups(recipe, model, grouping)
    creating = {"kinds": kinds(model), **creating}
    optimizer = create(groups, recipe.spec, lr=recipe.lr, weight_decay=recipe.weight_decay, **recipe.hyper, **creating)
    scheduler = schedule(
        optimizer,
        recipe.kind,
        warmup=recipe.warmup,
        total_steps=recipe.total_steps,
        floor=recipe.floor,
        **recipe.schedule,
    )
    return BuiltRecipe(recipe, optimizer, scheduler)


def _groups(recipe: Any, model: nn.Module, grouping: dict[str, Any]) -> list[dict[str, Any]]:
    if recipe.decays == "all" and not grouping:
        return [{"params": [(name, p) for name, p in model.named_parameters() if p.requires_grad]}]
    if "layerwise_decay" in grouping:
        grouping = {**grouping, "lr": recipe.lr}
    return param_groups(model, recipe.weight_decay, decay_embeddings=recipe.decays == "weights", **grouping)
