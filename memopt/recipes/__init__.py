"""Published recipes as data, and what is built of them."""

from memopt.recipes.making import Recipe, recipe
from memopt.recipes.published import PUBLISHED

__all__ = ["PUBLISHED", "Recipe", "recipe"]
