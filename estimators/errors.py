"""What the calculator refuses, and how values stand in its sentences."""

from __future__ import annotations

from memopt.untrusted.text import shown as shown  # every module here says its values so

#: Elements of a model: a thousand times the largest published one.
MAX_PARAMETERS = 10**15


class InputError(ValueError):
    """A model, a size or an option that cannot be used; the message names the value and what is allowed."""
