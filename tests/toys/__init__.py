"""A value on every axis, as a package of its own would have them; ``tests/spec/test_extending.py`` runs the contracts
on it.

As a plugin of pytest (``-p toys``, with ``MEMOPT_TOYS`` in the environment) it is there before the
table of cases is made.
"""

import os

from memopt.core.registry import register

VALUES = {
    "rule": ("toyrule", "toys.rule:RULE"),
    "format": ("toyhalf", "toys.format:Half"),
    "master": ("toycopy", "toys.master:Copy"),
    "placement": ("toyplace", "toys.placement:Elsewhere"),
    "partition": ("toyrows", "toys.partition:Rows"),
}

if "MEMOPT_TOYS" in os.environ:
    for _axis, (_name, _place) in VALUES.items():
        register(_axis, _name, _place)

    from tests.helpers import mastered  # it makes the table of cases

    mastered.BITS["toycopy"] = (24, 24)
    mastered.NBYTES["toycopy"] = 4


def pytest_collection_modifyitems(config, items):
    """Of each test one case with the toy of each axis alone, but of those that start a process without this plugin."""
    taken = {}
    chosen = []
    for item in items:
        named = [axis for axis, (name, _) in VALUES.items() if name in item.name]
        key = (item.function, tuple(named))
        if len(named) == 1 and not taken.get(key) and "fresh_process" not in item.name:
            taken[key] = True
            chosen.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
