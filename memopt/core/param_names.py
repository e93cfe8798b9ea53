"""Names without what wrappers put before them: a parameter has one name, whoever wraps the model.

``torch.compile`` puts ``_orig_mod.`` into names, DistributedDataParallel and DataParallel ``module.``, activation
checkpointing ``_checkpoint_wrapped_module.``, FSDP1 ``_fsdp_wrapped_module.``. Optimizers, prices, overrides and
checkpoints use names without them, so a run resumes with or without each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

#: Parts of a name that no module of a model has, only wrappers.
WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
#: What the data-parallel wrappers call the model: a module may have this name too.
PARALLEL = "module."


def clean_name(name: str) -> str:
    """The name without the parts that are wrappers' alone.

    >>> clean_name("_orig_mod.layers.0._checkpoint_wrapped_module.weight")
    'layers.0.weight'
    """
    if "_orig_mod" not in name and "_wrapped_module" not in name:
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def clean_names(names: Iterable[str]) -> list[str]:
    """The names of one model without what wrappers put into them. ``module.`` is a wrapper's where all names begin with
    it; two names never become one: where they would, names stay as they are.

    >>> clean_names(["module.0.weight", "module.0.bias"]), clean_names(["module.weight", "head.weight"])
    (['0.weight', '0.bias'], ['module.weight', 'head.weight'])
    """
    names = list(names)
    cleaned = [clean_name(name) for name in names]
    while cleaned and all(name.startswith(PARALLEL) and len(name) > len(PARALLEL) for name in cleaned):
        cleaned = [name[len(PARALLEL) :] for name in cleaned]
    return cleaned if len(set(cleaned)) == len(set(names)) else names


def matching(names: Sequence[str], others: Sequence[str]) -> tuple[list[str], list[str]]:
    """Both as they are to be compared: as they are where they are the same names, else without wrappers' parts."""
    if set(names) == set(others):
        return list(names), list(others)
    return clean_names(names), clean_names(others)


def clean_pattern(pattern: str) -> str:
    """A shell-style pattern over names as one over names without wrappers' parts.

    >>> clean_pattern("module._orig_mod.0.*")
    '0.*'
    """
    pattern = clean_name(pattern)
    while pattern.startswith(PARALLEL) and len(pattern) > len(PARALLEL):
        pattern = pattern[len(PARALLEL) :]
    return pattern
